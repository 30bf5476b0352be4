"""Read JSON files that may be damaged or may come from another program."""

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
        ValueError: the file is larger than ``MOST_BYTES``, is not JSON, or has more than
            ``MOST_DEPTH`` levels.
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    return parse(path.read_bytes())


def parse(text: bytes | str) -> Any:
    """Parse JSON text and return its value.

    Raises:
        ValueError: as for ``read``.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    # Nesting that json accepts may still exceed the recursion limit in code that walks the value.
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
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as for ``read``, or the value is not an object.
    """
    return _object(read(path))


def parse_object(text: bytes | str) -> dict[str, Any]:
    """Parse JSON text and return its object.

    Raises:
        ValueError: as for ``read_object``.
    """
    return _object(parse(text))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
