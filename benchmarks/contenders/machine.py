"""Facts about the machine and the code, stored with results of one process."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from allometry.trainer.record.hardware import describe
from allometry.trainer.record.writer import commit


def facts() -> dict[str, Any]:
    """Return date, command, commit, hardware and versions as JSON values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "hardware": {**describe(torch.device("cpu")), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        },
    }


def source_bytes(sequences: int, length: int) -> NDArray[np.int64]:
    """Return sequences [P, L + 1] of ASCII bytes of Python's standard library.

    They are the same on every machine with this version of Python.
    """
    library = Path(os.__file__).parent
    needed, kept = sequences * (length + 1), bytearray()
    for path in sorted(library.glob("*.py")):
        if len(kept) >= needed:
            break
        kept += bytes(byte for byte in path.read_bytes() if byte < 128)
    if len(kept) < needed:
        raise SystemExit(f"{library} holds {len(kept)} bytes of text, {needed} are needed")
    return np.frombuffer(bytes(kept[:needed]), np.uint8).astype(np.int64).reshape(-1, length + 1)
