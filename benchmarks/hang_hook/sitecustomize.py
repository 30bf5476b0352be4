"""Hang injection inside a rank: Python imports this module if its folder is on PYTHONPATH.

``hangs.py`` sets the variable HANG in JSON: ``rank`` stops at a function (``module:name``) from
``step`` on; ``how`` is "stop" (SIGSTOP), "sleep", or "die" (SIGKILL). The rank first creates the
file ``mark``, once.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path

ACTIONS = {
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1e6),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
}
STEPS = "allometry.trainer.step:TrainStep.__call__"


class Hook(importlib.abc.MetaPathFinder):
    """Wrap functions of two modules when these modules are imported."""

    def __init__(self, asked):
        self.asked, self.step = asked, 0
        self.wanted = {}
        for place, wrapper in ((asked["at"], self.hanging), (STEPS, self.counting)):
            module, name = place.split(":")
            self.wanted.setdefault(module, []).append((name, wrapper))

    def find_spec(self, name, path, target=None):
        if name not in self.wanted:
            return None
        wrappers = self.wanted.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def executed(module):
            execute(module)
            for function, wrapper in wrappers:
                *owners, last = function.split(".")
                owner = module
                for each in owners:
                    owner = getattr(owner, each)
                setattr(owner, last, wrapper(getattr(owner, last)))

        spec.loader.exec_module = executed
        return spec

    def counting(self, function):
        @wraps(function)
        def counted(model, step, *arguments):
            self.step = step
            return function(model, step, *arguments)

        return counted

    def hanging(self, function):
        asked, mark = self.asked, Path(self.asked["mark"])

        @wraps(function)
        def hung(*arguments, **named):
            here = os.environ.get("RANK", "0") == str(asked["rank"])
            if here and self.step >= asked["step"] and not mark.exists():
                mark.write_text(repr(time.time()))
                ACTIONS[asked["how"]]()
            return function(*arguments, **named)

        return hung


if "HANG" in os.environ:
    sys.meta_path.insert(0, Hook(json.loads(os.environ["HANG"])))
