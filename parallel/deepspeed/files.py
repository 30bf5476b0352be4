"""DeepSpeed's files on NVMe: a private folder, checked transfers, and removal after use.

DeepSpeed's asynchronous I/O reports success on a full disk and ends the process if a file is too
short. Transfers are therefore checked here: after a write the file must have its full size, and the
data that is read must have the checksum of the data that was written.
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
    """Raised if a file of optimizer states cannot be written, or differs from the written data."""


class SwapFolder:
    """Temporary folder of this process in ``parent``, removed with the object or at exit.

    A killed process leaves its folder behind. The next process that opens a folder in the same
    parent removes all folders whose lock is free. Raises UserError if ``parent`` cannot be used or
    has less than ``nbytes`` free. For example, ``SwapFolder("/local/nvme", 10**9).path``.
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
        """Return the total size of all files in bytes."""
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
"""Size and checksum of each file of this process, by path; several handles use the same files."""


class CheckedHandle:
    """DeepSpeed I/O handle that checks transfers in ``wait``.

    ``wait`` raises FilesLost if a transfer failed. A read of a file that is too short raises
    FilesLost immediately.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._reads: list[tuple[Tensor, str]] = []
        self._writes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pwrite(self, buffer: Tensor, path: Any, offset: int) -> int:
        """Start to write all of ``buffer``, which must not change until ``wait``."""
        path = str(path)
        _KNOWN[path] = _Written(buffer.nbytes, _checksum(buffer))
        self._writes.append(path)
        return self._begun(self._handle.async_pwrite(buffer, path, offset), "writing", path)

    def async_pread(self, buffer: Tensor, path: Any, offset: int) -> int:
        """Start to fill all of ``buffer`` from the file."""
        path = str(path)
        self._check_size(path, buffer.nbytes, "reading")
        self._reads.append((buffer, path))
        return self._begun(self._handle.async_pread(buffer, path, offset), "reading", path)

    def wait(self) -> int:
        """Wait for all started transfers; return the number of transfers."""
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
    """Return a 64-bit checksum that detects changed, lost and moved blocks of 4 KiB."""
    data = buffer.detach().contiguous().flatten().view(torch.uint8)
    whole = data.numel() // 4096 * 4096
    rows = data[:whole].view(torch.int64).view(-1, 512).sum(1)
    odd = torch.arange(1, 2 * len(rows), 2)
    rest = int(data[whole:].sum(dtype=torch.int64))
    return int((rows * odd).sum()) ^ rest


def _lost(doing: str, path: str, why: str) -> FilesLost:
    parent = path.partition(f"/{_PREFIX}")[0] or "?"
    return FilesLost(f"{doing} optimizer states in {KEY}={parent} failed: {why}")
