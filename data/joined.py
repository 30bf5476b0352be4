"""Index of several stores as if their .bin files were one (docs/file_formats.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from allometry.data.store import DTYPES, HEADER

_ENTRIES = 1 << 20


class _Index(NamedTuple):
    """Header of an index: token type, number of sequences, number of document indices."""

    path: Path
    code: int
    sequences: int
    indices: int

    def section(self, dtype: str, count: int, offset: int) -> NDArray[Any]:
        """Return the mapped array that begins ``offset`` bytes after the header."""
        return np.memmap(self.path, dtype, mode="r", offset=HEADER.size + offset, shape=(count,))


def write_joined_index(path: Path, indices: Sequence[Path]) -> None:
    """Write one index for the stores of ``indices``, concatenated.

    The stores must be valid, of the same dtype, and not empty. At most 2**20 entries are in memory.
    """
    parts = [_read_header(one) for one in indices]
    sequences = sum(part.sequences for part in parts)
    documents = sum(part.indices - 1 for part in parts)
    itemsize = DTYPES[parts[0].code].itemsize
    magic = HEADER.unpack(_head(parts[0].path))[0]
    with path.open("wb") as file:
        file.write(HEADER.pack(magic, 1, parts[0].code, sequences, documents + 1))
        for part in parts:
            _copy(file, part.section("<i4", part.sequences, 0), 0)
        base = 0
        for part in parts:
            _copy(file, part.section("<i8", part.sequences, 4 * part.sequences), base)
            lengths = part.section("<i4", part.sequences, 0)
            base += itemsize * int(lengths.sum(dtype=np.int64))
        base = 0
        for part in parts:
            firsts = part.section("<i8", part.indices, 12 * part.sequences)[:-1]
            _copy(file, firsts, base)
            base += part.sequences
        file.write(np.array([base], "<i8").tobytes())


def _copy(file: IO[bytes], numbers: NDArray[Any], base: int) -> None:
    for start in range(0, len(numbers), _ENTRIES):
        part = numbers[start : start + _ENTRIES]
        file.write((part + base if base else part).astype(numbers.dtype).tobytes())


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEADER.size)


def _read_header(path: Path) -> _Index:
    _, _, code, sequences, indices = HEADER.unpack(_head(path))
    return _Index(path, code, sequences, indices)
