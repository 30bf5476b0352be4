"""Reason of a failed write."""

from __future__ import annotations

from typing import NamedTuple

from allometry.trainer.state.folder import FULL


class Failure(NamedTuple):
    """Reason of a failed save in the system's words; ``full`` is True if the disk was full."""

    reason: str
    full: bool = False

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Return the innermost cause of DCP's nested exceptions, in one line."""
        failures = getattr(error, "failures", None)
        if failures:
            first = next(iter(failures.values()))
            error = first[0] if isinstance(first, tuple) else first
        if isinstance(error, OSError) and error.strerror:
            return cls(error.strerror, error.errno in FULL)
        return cls(f"{type(error).__name__}: {error}".split("\n")[0])
