"""Faults that change nothing that could be seen: by file and line after, with the reason."""

from __future__ import annotations

from mutations.choose import Mutant

EQUIVALENT: dict[tuple[str, str], str] = {}
"""(file, the line with the fault) -> why it computes the same."""


def reason_of(mutant: Mutant) -> str | None:
    """Return why a fault could not be seen; None: it should be."""
    return EQUIVALENT.get((mutant.file, mutant.after))
