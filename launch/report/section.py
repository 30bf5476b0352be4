"""Parts of a report: sections of figures and tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

from allometry.launch.figures.figure import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a head; numbers are aligned right.

    ``run_s``: the run of each row, or empty.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    run_s: tuple[int, ...] = ()

    def beside(self, other: Table) -> Table:
        """Return two tables with the same first column as one table."""
        rows = tuple((*one, *more[1:]) for one, more in zip(self.rows, other.rows, strict=True))
        caption = f"{self.caption} {other.caption}".strip()
        return replace(self, head=(*self.head, *other.head[1:]), rows=rows, caption=caption)

    def without_equal_columns(self) -> Table:
        """Return the table without constant columns, whose values move into the caption."""
        columns = list(zip(*self.rows, strict=True))
        equal = [len(self.rows) > 1 and len(set(column)) == 1 for column in columns]
        if not any(equal):
            return self
        said = ", ".join(
            f"{name} {column[0]}"
            for name, column, same in zip(self.head, columns, equal, strict=True)
            if same
        )

        def kept(cells: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(cell for cell, same in zip(cells, equal, strict=True) if not same)

        caption = f"{self.caption} The same in all rows: {said}.".lstrip()
        rows = tuple(kept(row) for row in self.rows)
        return replace(self, head=kept(self.head), rows=rows, caption=caption)


@dataclass(frozen=True, slots=True)
class Section:
    """Part of a report.

    ``absent``: the reason, in one line, for a section without content, or None.
    """

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

    def without_blanks(self) -> Section:
        """Return the section without panels that would be empty; a note names these panels."""
        figures, blank = [], []
        for figure in self.figures:
            panels = tuple(panel for panel in figure.panels if panel.drawn())
            blank += [panel.title for panel in figure.panels if panel not in panels]
            if panels:
                figures.append(replace(figure, panels=panels))
        if not blank:
            return self
        why = f"no finite value to draw for: {', '.join(blank)}"
        absent = None if figures or self.tables else why
        notes = (*self.notes, *([] if absent else [f"N{why[1:]}."]))
        return replace(self, figures=tuple(figures), notes=notes, absent=absent)
