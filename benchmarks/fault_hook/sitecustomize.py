"""Python imports this at its start where ``faults.py`` puts its folder on PYTHONPATH.

Before the training step that the variable FAULT names, [what, rank, step, file] in JSON, the rank
does what it says: the file is made first. What ends the rank is done once; a step that is not a
number is none whenever it is taken, and a slow rank is slow from that step on.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

SLOW_S = 0.9  # of each step


def spoil(step):
    """Let the losses, and so the gradients, of this step's batch on this rank be NaN."""
    execution = step.parallel.execution
    plain = execution.train

    def train(batches, scale, *rest):
        execution.train = plain
        return plain(batches, scale * float("nan"), *rest)

    execution.train = train


def slow(_):
    """Compute for longer than the other ranks do."""
    until = time.time() + SLOW_S
    while time.time() < until:
        pass


ACTIONS = {
    "exit137": lambda _: os._exit(137),  # as a process ends that a container's memory limit killed
    "hang": lambda _: time.sleep(1e6),
    "nan": spoil,
    "slow": slow,
}
AGAIN = {"nan": False, "slow": True}  # what is not done once: at that step alone, or from it on


class Hook(importlib.abc.MetaPathFinder):
    """Changes ``TrainStep`` when its module is imported, and no other import."""

    def find_spec(self, name, path, target=None):
        if name != "allometry.trainer.step":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            take = module.TrainStep.__call__

            def faulty(self, step, *arguments):
                what, rank, at, file = json.loads(os.environ["FAULT"])
                now = step >= at if AGAIN.get(what) else step == at
                here = now and os.environ.get("RANK") == str(rank)
                if here and (what in AGAIN or not Path(file).exists()):
                    Path(file).write_text(str(rank))
                    ACTIONS[what](self)
                return take(self, step, *arguments)

            module.TrainStep.__call__ = faulty

        spec.loader.exec_module = executed
        return spec


if "FAULT" in os.environ:
    sys.meta_path.insert(0, Hook())
