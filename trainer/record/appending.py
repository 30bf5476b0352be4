"""Append to files during training, on disks that may be full."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from allometry.configs.errors import UserError

RETRY_AFTER_S = (1.0, 5.0)
"""Pauses before the retries of entries that are pending at the end of a launch."""


class Appender:
    """Appends complete entries to a file; failed entries are retried with the next one.

    Errors do not end the run. After a failed write the file is truncated to its last complete
    entry. ``kind``: name of an entry in messages.
    """

    def __init__(self, path: Path, kind: str = "rows") -> None:
        self._path, self._kind = path, kind
        self._file: BinaryIO | None = None
        self._whole: int | None = None  # bytes of complete entries, after a failed write
        self._pending: list[bytes] = []
        self._reason = ""

    def open(self) -> None:
        """Open the file now instead of at the first entry.

        Raises:
            UserError: the file cannot be opened.
        """
        try:
            self._opened()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; mend that"
            ) from None

    def append(self, entry: bytes) -> str | None:
        """Write all pending entries and this one; return the reason of a failure, else None."""
        self._pending.append(entry)
        return self._write()

    def close(self) -> str | None:
        """Write the pending entries, with retries; describe those that could not be written."""
        for pause in (0.0, *RETRY_AFTER_S):
            if not self._pending:
                break
            time.sleep(pause)
            self._write()
        try:
            if self._file is not None:
                self._file.close()  # some file systems report a full disk here
        except OSError as error:
            return f"{self._path} could not be written to its end ({error.strerror})"
        if not self._pending:
            return None
        count = len(self._pending)
        return f"{count} {self._kind} of {self._path} could not be written ({self._reason})"

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        return self._file

    def _write(self) -> str | None:
        start = None
        try:
            file = self._opened()
            if self._whole is not None:
                file.truncate(self._whole)
            start = file.seek(0, 2)
            rest = memoryview(b"".join(self._pending))
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            self._reason = error.strerror or str(error)
            self._whole = start if self._whole is None else self._whole
            if self._file is not None and self._whole is not None:
                with suppress(OSError):  # retried before the next write
                    self._file.truncate(self._whole)
            return self._reason
        self._pending.clear()
        self._whole = None
        return None
