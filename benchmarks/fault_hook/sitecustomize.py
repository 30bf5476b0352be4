"""Fault injection inside a rank: Python imports this module if its folder is on PYTHONPATH.

``faults.py`` sets the variable FAULT to [action, rank, step, file] in JSON. Before that training
step the rank creates the file and executes the action. An action that ends the rank happens once; a
NaN step gives NaN each time it is taken, and a slow rank is slow from that step on.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

SLOW_S = 0.9  # per step


def spoil(step):
    """Replace the losses of this step's batch on this rank by NaN, which gives NaN gradients."""
    execution = step.parallel.execution
    plain = execution.train

    def train(batches, scale, *rest):
        execution.train = plain
        return plain(batches, scale * float("nan"), *rest)

    execution.train = train


def slow(_):
    """Compute for SLOW_S longer than the other ranks."""
    until = time.time() + SLOW_S
    while time.time() < until:
        pass


ACTIONS = {
    "exit137": lambda _: os._exit(137),  # exit code under a container memory limit
    "hang": lambda _: time.sleep(1e6),
    "nan": spoil,
    "slow": slow,
}
AGAIN = {"nan": False, "slow": True}  # repeated actions: at that step only, or from that step on


class Hook(importlib.abc.MetaPathFinder):
    """Wrap ``TrainStep`` when its module is imported, and no other module."""

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
