"""Worker process of ``allometry.launch.ladder_worker``, which trains runs one after the other.

Python and torch take seconds to start, which many small runs should not repeat. Requests are lines
of JSON on standard input, {"config": path, "log": path}; replies are lines on the initial standard
output of the process, {"error": sentence or null, "stopped": signal or null}. The output of a run
goes to its log. A signal stops the run like ``allometry train``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from typing import Any

from allometry.configs.errors import UserError
from allometry.trainer.stop import STOP_SIGNALS


def serve(allocator: str, cuda_allocator: str | None = None) -> None:
    """Train the runs requested on standard input, until it ends; ``allocator`` is recorded."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        for line in sys.stdin:
            answer = _answer(json.loads(line), allocator, cuda_allocator)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    except KeyboardInterrupt:
        pass


def _answer(request: dict[str, str], allocator: str, cuda_allocator: str | None) -> dict[str, Any]:
    with open(request["log"], "a", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    try:
        from allometry.configs.loader import load
        from allometry.interop.huggingface.model import import_model
        from allometry.trainer.record.facts import Invocation
        from allometry.trainer.train import train

        command = ["allometry", "train", request["config"]]
        invocation = Invocation(allocator, command, cuda_allocator)
        result = train(load(request["config"]), invocation=invocation, importer=import_model)
        return {"error": None, "stopped": result.stopped_by}
    except UserError as error:
        print(f"allometry: {error}", file=sys.stderr)
        return {"error": str(error), "stopped": None}
    except KeyboardInterrupt:  # before the first step of this launch, or after the last
        return {"error": None, "stopped": "SIGTERM"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "stopped": None}
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
