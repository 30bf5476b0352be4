"""DeepSpeed's files on NVMe: private, checked, and gone when nobody uses them.

Its asynchronous I/O takes a full disk for a success and ends the process where a file is too short,
so what goes through it is watched here: after a write the file must have its size, and what is read
must have the checksum of what was written.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.parallel.folder import KEY, ready

_PREFIX = "allometry-deepspeed-"
_OWNED = "in-use"


class FilesLost(UserError):
    """What is in files cannot be written, or read as it was written."""


class SwapFolder:
    """A folder of this process in ``parent``, which goes with it or with this object.

    A process that is killed leaves its folder behind; whoever opens the next one in the same place
    removes those whose lock nobody holds. Raises UserError: ``parent`` cannot be used, or has less
    than ``nbytes`` free.
    """

    def __init__(self, parent: str | Path, nbytes: int) -> None:
        self.parent = Path(parent)
        try:
            ready(self.parent)
            self.removed = _remove_abandoned(self.parent)
            found = os.statvfs(self.parent)
            if (free := found.f_bavail * found.f_frsize) < nbytes:
                raise UserError(
                    f"{KEY}={parent}: a rank's parameters and optimizer states take "
                    f"{nbytes / 1e9:,.1f} GB there, and {free / 1e9:,.1f} GB are free; choose "
                    "another folder or free space"
                )
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.parent))  # mode 0700
            lock = os.open(self.path / _OWNED, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{KEY}={parent}: {error.strerror or error}; choose another folder"
            ) from None
        self.close = weakref.finalize(self, _remove, self.path, lock)

    def held_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.path.rglob("*.swp"))


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(parent: Path) -> list[str]:
    removed = []
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(path / _OWNED, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path.name)
            finally:
                os.close(lock)
    return removed


class _Written(NamedTuple):
    nbytes: int
    sum: int


_KNOWN: dict[str, _Written] = {}
"""What the files of this process hold, by path; several handles use the same files."""


class CheckedHandle:
    """An I/O handle of DeepSpeed's whose transfers are checked when they are waited for.

    Raises FilesLost there, and at once where a file lacks what is to be read.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._reads: list[tuple[Tensor, str]] = []
        self._writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pwrite(self, buffer: Tensor, path: Any, offset: int) -> int:
        """Begin to write all of ``buffer``, which may not change until ``wait``."""
        path = str(path)
        _KNOWN[path] = _Written(buffer.nbytes, _checksum(buffer))
        self._writes.append(path)
        return self._begun(self._handle.async_pwrite(buffer, path, offset), "writing", path)

    def async_pread(self, buffer: Tensor, path: Any, offset: int) -> int:
        """Begin to fill all of ``buffer``."""
        path = str(path)
        self._check_size(path, buffer.nbytes, "reading")
        self._reads.append((buffer, path))
        return self._begun(self._handle.async_pread(buffer, path, offset), "reading", path)

    def wait(self) -> int:
        """Wait for all that was begun; return how many transfers that was."""
        count = int(self._handle.wait())
        writes, self._writes = self._writes, []
        reads, self._reads = self._reads, []
        if count != len(writes) + len(reads):
            raise _lost("waiting for", next(iter(writes), ""), f"{count} transfers ended")
        for path in writes:
            self._check_size(path, _KNOWN[path].nbytes, "writing")
        for buffer, path in reads:
            known = _KNOWN.get(path)
            if known is None or known != _Written(buffer.nbytes, _checksum(buffer)):
                raise _lost("reading", path, "they are not what was written")
        return count

    def _begun(self, result: int, doing: str, path: str) -> int:
        if result != 0:
            raise _lost(doing, path, "the transfer was refused")
        return result

    def _check_size(self, path: str, nbytes: int, doing: str) -> None:
        size = -1
        with suppress(OSError):
            size = os.stat(path).st_size
        if size < nbytes:
            why = "the file is gone" if size < 0 else f"the file has {size} of {nbytes} bytes"
            raise _lost(doing, path, f"{why}: is the disk full?" if doing == "writing" else why)


def _checksum(buffer: Tensor) -> int:
    """Return a sum over words that notices changed, lost and moved blocks of 4 KiB."""
    data = buffer.detach().contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 4096 * 4096
    rows = data[:whole].view(torch.int64).view(-1, 512).sum(1)
    odd = torch.arange(1, 2 * len(rows), 2)
    rest = int(data[whole:].sum(dtype=torch.int64))
    return int((rows * odd).sum()) ^ rest


def _lost(doing: str, path: str, why: str) -> FilesLost:
    parent = path.partition(f"/{_PREFIX}")[0] or "?"
    return FilesLost(f"{doing} optimizer states in {KEY}={parent} failed: {why}")
