"""Files that grow while a run trains, on disks that may be full."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from allometry.configs.errors import UserError

RETRY_AFTER_S = (1.0, 5.0)
"""Pauses before what is left at the end of a launch is tried again."""


class Appender:
    """Appends whole entries to a file; what cannot be written is kept and tried with the next one.

    No error ends the run. After a failed write the file is cut back to its last whole entry.
    ``kind``: what an entry is called in messages.
    """

    def __init__(self, path: Path, kind: str = "rows") -> None:
        self._path, self._kind = path, kind
        self._file: BinaryIO | None = None
        self._whole: int | None = None  # bytes of whole entries, after a write that failed
        self._pending: list[bytes] = []
        self._reason = ""

    def open(self) -> None:
        """Open the file now instead of at the first entry.

        Raises:
            UserError: it cannot be opened.
        """
        try:
            self._opened()
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; mend that"
            ) from None

    def append(self, entry: bytes) -> str | None:
        """Write an entry and all before it that could not be written; why that failed, if so."""
        self._pending.append(entry)
        return self._write()

    def close(self) -> str | None:
        """Write what is pending, with pauses; what could not be written, if anything."""
        for pause in (0.0, *RETRY_AFTER_S):
            if not self._pending:
                break
            time.sleep(pause)
            self._write()
        try:
            if self._file is not None:
                self._file.close()  # where some file systems say that the disk is full
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
                with suppress(OSError):  # before the next write it is tried again
                    self._file.truncate(self._whole)
            return self._reason
        self._pending.clear()
        self._whole = None
        return None
