"""Reading JSON that may have been damaged, or written by somebody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 28
MOST_DEPTH = 64


def read(path: str | Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than ``MOST_BYTES``, is not JSON or nests more than ``MOST_DEPTH``
            deep.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return parse(path.read_bytes())


def parse(text: bytes | str) -> Any:
    """Return the value that ``text`` is; ValueError as for ``read``."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    # What nests less than Python's own limit would still end whoever walks it further in.
    level, depth = [value], 0
    while level := [
        inner
        for one in level
        if isinstance(one, dict | list)
        for inner in (one.values() if isinstance(one, dict) else one)
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth >= MOST_DEPTH:
            raise ValueError("it nests too deeply")
    return value


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises as ``read`` does, also where it is none."""
    return _object(read(path))


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Return the object that ``text`` is; ValueError as for ``read_object``."""
    return _object(parse(text))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
