"""Send the files of a folder from one rank to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist

PIECE_BYTES = 16 << 20


class Parcel(NamedTuple):
    """A folder's files with their sizes, sent to or received from rank ``peer``."""

    peer: int
    folder: Path
    files: list[tuple[str, int]]

    def pieces(self) -> Iterator[tuple[str, int]]:
        """Yield file name and byte count of each piece, in the order of transfer."""
        for name, size in self.files:
            for start in range(0, size, PIECE_BYTES):
                yield name, min(PIECE_BYTES, size - start)


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Return the names and sizes of a folder's files."""
    return [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]


def exchange(
    group: dist.ProcessGroup, sent: Parcel | None, received: Parcel | None
) -> OSError | None:
    """Send one folder's files and receive those of another; both ranks of each pair call this.

    The received folder is created. If the disk is full, further data are received and discarded, so
    that the sender is not blocked, and the error is returned.
    """
    out = sent.pieces() if sent else iter(())
    coming = received.pieces() if received else iter(())
    reading, writing = _Reader(sent), _Writer(received)
    with reading, writing:
        while True:
            mine, theirs = next(out, None), next(coming, None)
            if mine is None and theirs is None:
                break
            works, buffer = [], None
            if theirs is not None:
                assert received is not None
                buffer = torch.empty(theirs[1], dtype=torch.uint8)
                works.append(dist.irecv(buffer, src=received.peer, group=group))
            if mine is not None:
                assert sent is not None
                data = torch.frombuffer(reading.read(*mine), dtype=torch.uint8)
                works.append(dist.isend(data, dst=sent.peer, group=group))
            for work in works:
                assert work is not None
                work.wait()
            if theirs is not None and buffer is not None:
                writing.write(theirs[0], memoryview(buffer.numpy()))
    return writing.error


class _Open:
    def __init__(self, parcel: Parcel | None) -> None:
        self._parcel = parcel
        self._name: str | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class _Reader(_Open):
    """Reads pieces; unreadable bytes become zeros, which the receiver's check detects."""

    def read(self, name: str, size: int) -> bytearray:
        assert self._parcel is not None
        data = bytearray(size)
        with suppress(OSError):
            if self._name != name or self._file is None:
                self._close()
                place = self._parcel.folder / name
                self._name, self._file = name, open(place, "rb")  # noqa: SIM115
            self._file.readinto(data)  # type: ignore[attr-defined]
        return data


class _Writer(_Open):
    """Creates the folder and its files, including empty files."""

    def __init__(self, parcel: Parcel | None) -> None:
        super().__init__(parcel)
        self.error: OSError | None = None
        try:
            if parcel is not None:
                parcel.folder.mkdir(parents=True)
                for name, _ in parcel.files:
                    (parcel.folder / name).touch()
        except OSError as error:
            self.error = error

    def write(self, name: str, data: memoryview) -> None:
        assert self._parcel is not None
        if self.error is not None:
            return
        try:
            if self._name != name or self._file is None:
                self._close()
                place = self._parcel.folder / name
                self._name, self._file = name, open(place, "ab")  # noqa: SIM115
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self.error = error
