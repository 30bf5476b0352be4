"""Reading JSON that may have been damaged, or written by somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 28


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than ``MOST_BYTES``, is not JSON, nests too deeply or holds
            something other than an object.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return parse_object(path.read_bytes())


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Return the object that ``text`` is; ValueError as for ``read_object``."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
