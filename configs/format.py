"""Format numbers and durations for people; imports no heavy package."""

from __future__ import annotations

from collections.abc import Sequence


def human(number: float) -> str:
    """Return a number with three significant digits and a unit: ``human(25.2e6)`` is "25.2M"."""
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= bound:
            return f"{number / bound:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: ``duration(3700)`` is "1h01m"."""
    whole = round(seconds)
    for size, unit, below, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // below:02d}{small}"
    return f"{whole}s"


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first ``most`` names and the number of further names: "a, b, c and 2 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
