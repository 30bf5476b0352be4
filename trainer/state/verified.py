"""Read a checkpoint and verify the bytes in memory.

A file can be undamaged when it is checked and still be read incorrectly later: by a faulty cable,
cache or network file system. The bytes used are therefore compared with ``complete.json`` in the
memory into which they were read, and are used from there. ``complete.json`` needs no checksum of
its own, since an incorrectly read copy does not match the other files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from allometry.configs.errors import UserError
from allometry.trainer.state.integrity import (
    COMPLETE,
    READ_BYTES,
    TRIES,
    Block,
    Listing,
    forget,
    listing,
    say_healed,
    unreadable,
)


class Span(NamedTuple):
    """``size`` bytes of a file from offset ``start``."""

    start: int
    size: int


class VerifiedFiles:
    """Files of the checkpoint ``folder``, verified when read.

    Bytes with a wrong checksum are read once more, from the disk instead of the page cache.

    Raises:
        UserError: the second read is wrong, too, or the file cannot be read or is not listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._crcs: dict[str, dict[Span, int]] = {}

    @cached_property
    def _listing(self) -> Listing:
        try:
            return listing(self._folder)
        except (OSError, ValueError) as error:
            raise self.unreadable(COMPLETE, error) from None

    def whole(self, name: str) -> bytes:
        """Return the verified contents of a file that fits into memory."""
        blocks = self._blocks(name)
        for left in reversed(range(TRIES)):
            with self._opened(name) as file:
                parts = [self._read(file, name, Span(b.start, b.size)) for b in blocks]
            changed = any(zlib.crc32(p) != b.crc for p, b in zip(parts, blocks, strict=True))
            if not changed:
                self._warn(name, left)
                break
            if not left:
                raise self._changed(name)
            forget(self._folder / name)
        return b"".join(parts)

    def pieces(
        self, name: str, wanted: Iterable[Span], all_spans: Iterable[Span]
    ) -> Iterator[tuple[Span, bytes]]:
        """Yield the ``wanted`` spans of a file, given ``all_spans`` of its tensors, one by one.

        Files of earlier versions, without checksums of tensors, are read once more to compute them.
        """
        if name not in self._crcs:
            self._crcs[name] = self._known(name, sorted(set(all_spans)))
        crcs = self._crcs[name]
        with self._opened(name) as file:
            for span in sorted(set(wanted)):
                yield span, self._piece(file, name, span, crcs[span])

    def _piece(self, file: FileIO, name: str, span: Span, crc: int) -> bytes:
        for left in reversed(range(TRIES)):
            data = self._read(file, name, span)
            if zlib.crc32(data) == crc and len(data) == span.size:
                self._warn(name, left)
                break
            if not left:
                raise self._changed(name)
            forget(self._folder / name)
        return data

    def _known(self, name: str, spans: list[Span]) -> dict[Span, int]:
        """Return the CRC-32 of each span."""
        known = self._listing.pieces.get(name)
        if known is None:
            return self._computed(name, spans)
        if len(known) != len(spans):
            raise self._changed(name)
        return dict(zip(spans, known, strict=True))

    def _computed(self, name: str, spans: list[Span]) -> dict[Span, int]:
        """Return the CRC-32 of each span, computed in a pass that verifies the file's blocks."""
        for left in reversed(range(TRIES)):
            found = dict.fromkeys(spans, 0)
            if self._passes(name, found):
                self._warn(name, left)
                return found
            forget(self._folder / name)
        raise self._changed(name)

    def _passes(self, name: str, crcs: dict[Span, int]) -> bool:
        """Update the CRC-32 of each span in one pass; return True if all blocks are correct."""
        spans = sorted(crcs, reverse=True)
        with self._opened(name) as file:
            for block in self._blocks(name):
                crc, at, end = 0, block.start, block.start + block.size
                while at < end:
                    data = self._read(file, name, Span(at, min(READ_BYTES, end - at)))
                    if not data:
                        return False
                    crc = zlib.crc32(data, crc)
                    _add(crcs, spans, at, memoryview(data))
                    at += len(data)
                if crc != block.crc:
                    return False
        return True

    def _blocks(self, name: str) -> list[Block]:
        blocks = [block for block in self._listing.blocks if block.name == name]
        if not blocks:
            raise UserError(
                f"checkpoint {self._folder} is damaged ({COMPLETE} does not list {name}); use "
                "another one"
            )
        return blocks

    @contextmanager
    def _opened(self, name: str) -> Iterator[FileIO]:
        try:
            # Unbuffered, because a buffer would return the same bytes on a second read.
            file = open(self._folder / name, "rb", buffering=0)  # noqa: SIM115 - closed below
        except OSError as error:
            raise self.unreadable(name, error) from None
        with file:
            yield file

    def _read(self, file: FileIO, name: str, span: Span) -> bytes:
        try:
            file.seek(span.start)
            parts, left = [], span.size
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)
        except OSError as error:
            raise self.unreadable(name, error) from None

    def unreadable(self, name: str, error: OSError | ValueError) -> UserError:
        """Return the error about a checkpoint whose file ``name`` cannot be read."""
        problem = unreadable(name, error)
        return UserError(f"checkpoint {self._folder} is damaged ({problem}); use another one")

    def _warn(self, name: str, left: int) -> None:
        if left < TRIES - 1:
            say_healed(self._folder / name)

    def _changed(self, name: str) -> UserError:
        return UserError(
            f"checkpoint {self._folder} is damaged ({name} has changed since it was written, or is "
            f"read wrongly, {TRIES} times); run again if the disk was at fault, or use another one"
        )


def _add(crcs: dict[Span, int], left: list[Span], at: int, data: memoryview) -> None:
    """Update the CRC-32 of the spans that overlap the bytes from offset ``at``.

    ``left``: spans that have not ended yet, the last span first.
    """
    past = at + len(data)
    while left and left[-1].start < past:
        span = left[-1]
        stop = span.start + span.size
        crcs[span] = zlib.crc32(data[max(span.start, at) - at : stop - at], crcs[span])
        if stop > past:
            break
        left.pop()
