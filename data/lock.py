"""Lock of a folder against concurrent preparations."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from allometry.configs.errors import UserError

LOCK = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create the folder ``out`` and lock it for the duration of the ``with`` block.

    For example, ``with locked(Path("tokens")): ...``. The lock is an exclusive ``flock`` on
    ``out``/.lock.

    Raises:
        UserError: another process has the lock, or the disk refuses a write in the block.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another `allometry prepare` is writing into {out}; wait for it or choose "
                    "another output folder"
                ) from error
            yield
    except OSError as error:
        raise UserError(
            f"cannot write token files into {out} ({error.strerror or error}); make room or choose "
            "another output folder"
        ) from error
