"""Concatenated token files: one .bin, or the shards in a list.

``PREFIX.shards.json`` replaces ``PREFIX.bin`` if the tokens are in several files; it lists the
files. ``PREFIX.idx`` is then the concatenated index of all files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from allometry.configs import json_file
from allometry.configs.base import Section
from allometry.configs.errors import UserError
from allometry.data.manifest import FileRecord

ENDING = ".shards.json"


class Shard(Section):
    """One .bin file: its path (relative to the list's folder, or absolute) and its contents."""

    path: str
    documents: int
    tokens: int
    file: FileRecord


class ShardList(Section):
    """The .bin files of a store, in the order of its documents."""

    kind: Literal["allometry.shards"] = "allometry.shards"
    version: Literal[1] = 1
    dtype: str
    shards: tuple[Shard, ...]


def shards_path(prefix: str | Path) -> Path:
    """Return the path of the list of shards of ``prefix``."""
    return Path(f"{prefix}{ENDING}")


def read_shards(path: Path) -> ShardList:
    """Return the list in ``path``; UserError if the file cannot be read."""
    try:
        return ShardList.model_validate(json_file.read_object(path))
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        first = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = f"{error.errors()[0]['msg']} at {'.'.join(map(str, error.errors()[0]['loc']))}"
        raise UserError(
            f"list of shards {path} cannot be read ({first}); adopt the shards again into another "
            "folder"
        ) from None


def shard_files(path: Path, listed: ShardList) -> list[Path]:
    """Return the .bin files of a list; UserError if a file is missing or has another size."""
    files = [path.parent / shard.path for shard in listed.shards]
    for file, shard in zip(files, listed.shards, strict=True):
        try:
            size: int | None = os.stat(file).st_size
        except OSError:
            size = None
        if size != shard.file.bytes:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise UserError(
                f"shard {file} {problem}, but {path} recorded {shard.file.bytes} bytes; bring it "
                "back, or adopt the shards again into another folder"
            )
    return files


class TokenLine:
    """Concatenated tokens of ``files``, with ``counts`` tokens each, mapped on first read.

    For example, ``TokenLine(files, [100, 50], dtype).read(90, 110)`` joins tokens of two files.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.files = tuple(files)
        self.dtype = dtype
        self._starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self._mapped: list[NDArray[Any] | None] = [None] * len(files)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def find(self, places: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        """Return the file of each of ``places``, and the token's index within that file."""
        found = np.searchsorted(self._starts[1:-1], places, side="right")
        return found, places - self._starts[found]

    def tokens(self, file: int) -> NDArray[Any]:
        """Return a view of all tokens of a file."""
        mapped = self._mapped[file]
        if mapped is None:
            # A plain array, as slicing an np.memmap costs more than the copy of a short document.
            mapped = np.memmap(self.files[file], self.dtype, mode="r").view(np.ndarray)
            self._mapped[file] = mapped
        return mapped

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Return tokens ``begin`` to ``end`` (exclusive), as a view if they are in one file."""
        first = int(np.searchsorted(self._starts[1:-1], begin, side="right"))
        base = int(self._starts[first])
        if end <= self._starts[first + 1]:
            return self.tokens(first)[begin - base : end - base]
        parts = []
        while begin < end:
            stop = min(end, int(self._starts[first + 1]))
            base = int(self._starts[first])
            parts.append(self.tokens(first)[begin - base : stop - base])
            begin, first = stop, first + 1
        return np.concatenate(parts)
