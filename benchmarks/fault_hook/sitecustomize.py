"""Python imports this at its start where ``faults.py`` puts its folder on PYTHONPATH.

Before the training step that the variable FAULT names, [what, rank, step, file] in JSON, the rank
does what it says, once: the file is made first.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

ACTIONS = {
    "exit137": lambda: os._exit(137),  # as a process ends that a container's memory limit killed
    "hang": lambda: time.sleep(1e6),
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
                if step == at and os.environ.get("RANK") == str(rank) and not Path(file).exists():
                    Path(file).touch()
                    ACTIONS[what]()
                return take(self, step, *arguments)

            module.TrainStep.__call__ = faulty

        spec.loader.exec_module = executed
        return spec


if "FAULT" in os.environ:
    sys.meta_path.insert(0, Hook())
