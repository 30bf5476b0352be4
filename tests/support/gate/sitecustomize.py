"""Imported by Python at startup through ``gates.Gate``: training then waits before a step.

The process creates a file named by its process id while it waits, and continues when the test
creates the file ``open`` or sends a signal that has a handler.
"""

import importlib.abc
import importlib.util
import os
import select
import signal
import sys
from pathlib import Path


class Hold(importlib.abc.MetaPathFinder):
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

            def gated(self, step, *arguments):
                if step == int(os.environ["GATE_STEP"]):
                    wait(Path(os.environ["GATE_FOLDER"]))
                return take(self, step, *arguments)

            module.TrainStep.__call__ = gated

        spec.loader.exec_module = executed
        return spec


def wait(folder):
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    before = signal.set_wakeup_fd(tell)
    (folder / str(os.getpid())).touch()
    while not (folder / "open").exists() and not select.select([told], [], [], 0.02)[0]:
        pass
    signal.set_wakeup_fd(before)


if "GATE_STEP" in os.environ:
    sys.meta_path.insert(0, Hold())
