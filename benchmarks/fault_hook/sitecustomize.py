"""Python imports this at its start where ``faults.py`` puts its folder on PYTHONPATH.

Before the training step that the variable FAULT names, [what, rank, step, file] in JSON, the rank
does what it says: the file is made first. What ends the rank is done once; a step that is not a
number is none whenever it is taken.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def spoil(step):
    """Let the losses, and so the gradients, of this step's batch on this rank be NaN."""
    execution = step.parallel.execution
    plain = execution.train

    def train(batches, scale, *rest):
        execution.train = plain
        return plain(batches, scale * float("nan"), *rest)

    execution.train = train


ACTIONS = {
    "exit137": lambda _: os._exit(137),  # as a process ends that a container's memory limit killed
    "hang": lambda _: time.sleep(1e6),
    "nan": spoil,
}


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
                here = step == at and os.environ.get("RANK") == str(rank)
                if here and (what == "nan" or not Path(file).exists()):
                    Path(file).touch()
                    ACTIONS[what](self)
                return take(self, step, *arguments)

            module.TrainStep.__call__ = faulty

        spec.loader.exec_module = executed
        return spec


if "FAULT" in os.environ:
    sys.meta_path.insert(0, Hook())
