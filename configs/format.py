"""Numbers and times as people read them; loads nothing."""

from __future__ import annotations

from collections.abc import Sequence


def human(number: float) -> str:
    """A number with three digits and a unit: 25.2M."""
    for bound, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= bound:
            return f"{number / bound:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Seconds as the two largest units."""
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
    """The first names and how many there are more, for a sentence."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
