"""Files that are intact but read wrongly: one bit of the data read from a file differs."""

from __future__ import annotations

import builtins
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _Wrong(io.FileIO):
    """File in which the byte at ``at`` is read with one bit flipped."""

    def __init__(self, path: Any, at: int, wrong: Callable[[], bool]) -> None:
        super().__init__(path, "rb")
        self._at, self._wrong = at, wrong

    read = io.RawIOBase.read  # through readinto, like a buffered read

    def readinto(self, buffer: Any, /) -> int:
        begun = self.tell()
        count = super().readinto(buffer) or 0
        if begun <= self._at < begun + count and self._wrong():
            memoryview(buffer).cast("B")[self._at - begun] ^= 1
        return count

    def readall(self) -> bytes:
        data = bytearray(1 << 20)
        found = bytearray()
        while count := self.readinto(data):
            found += data[:count]
        return bytes(found)


@contextmanager
def wrong_reads(file: Path, at: int, times: int = 1 << 30) -> Iterator[list[int]]:
    """Read the byte ``at`` of ``file`` wrongly ``times`` times in this process;
    yield the offsets."""
    real, real_of_path = builtins.open, Path.open
    seen: list[int] = []

    def wrong() -> bool:
        seen.append(at)
        return len(seen) <= times

    def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "rb" and isinstance(path, str | Path) and Path(path) == file:
            raw = _Wrong(path, at, wrong)
            return raw if options.get("buffering") == 0 else io.BufferedReader(raw)
        return real(path, mode, *args, **options)

    def opened_of_path(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "rb" and path == file:
            return opened(path, mode)
        return real_of_path(path, mode, *args, **options)

    builtins.open = opened
    Path.open = opened_of_path  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        builtins.open = real
        Path.open = real_of_path  # type: ignore[method-assign]
