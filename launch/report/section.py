"""What a report is made of: sections of figures and tables."""

from __future__ import annotations

from dataclasses import dataclass

from allometry.launch.figures.figure import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head; numbers are aligned right. ``run_s``: whose a row is, or empty."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    run_s: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report. ``absent`` says in one line why there is nothing to show, or None."""

    key: str
    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    absent: str | None = None

    def __post_init__(self) -> None:
        shown = bool(self.figures or self.tables)
        assert shown == (self.absent is None), f"{self.key}: shown, or absent with a reason"
