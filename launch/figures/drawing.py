"""Figures drawn by matplotlib to files: PNG, SVG or PDF."""

from __future__ import annotations

import math
import os
from errno import EACCES, EISDIR
from pathlib import Path
from typing import Any, TextIO

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.launch.figures.figure import Figure, Panel, Series, Ticks, rows_of, shortened

FORMATS = (".png", ".svg", ".pdf")
MARKERS = {"dots": "o", "point": "s", "star": "*", "cross": "x"}
SIZES = {"dots": 3.0, "point": 4.0, "star": 12.0, "cross": 7.0}
COLUMNS, FAINT, FEW_TICKS = 2, 0.35, 3
DASHES: dict[str, Any] = {"dashed": "--", "dotted": (0, (1.0, 6.0))}
SHORT = 100.0
"""Ratio of the ends of a logarithmic axis below which its ticks are 1, 2 and 5 times powers."""
NAMED = 12
"""Maximum number of entries of a legend."""
MANY_ROWS = 32
"""Number of rows above which bars have no gaps and links are thin."""


def check_format(out: Path) -> None:
    """Create the folder of ``out``. Raises UserError: the folder or the file name is not usable.

    For example, ``check_format(Path("plots/loss.svg"))``; the suffix is one of FORMATS.
    """
    if out.suffix not in FORMATS:
        raise UserError(f"--out={out}: a figure is written as {', '.join(FORMATS)}; name one so")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(EACCES, "its folder may not be written to")
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {error.strerror}; choose another path"
        ) from None


def draw(figure: Figure, out: Path | TextIO) -> None:
    """Write the figure, two panels in a row; the last of an odd number of panels fills its row.

    A path's suffix chooses the format; an open file receives SVG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = rows_of(len(figure.panels), COLUMNS)
    size = figure.size or (6.5 * max(rows), 4.3 * len(rows))
    drawn = plt.figure(figsize=size, layout="constrained")
    places = drawn.add_gridspec(len(rows), COLUMNS)
    panels = iter(figure.panels)
    for row, number in enumerate(rows):
        width = COLUMNS // number
        for column in range(number):
            panel, first = next(panels), row == column == 0
            axis = drawn.add_subplot(places[row, column * width : (column + 1) * width])
            draw_panel(axis, panel)
            if figure.legend or first:  # otherwise all panels show the same runs
                _legend(axis, above=any(series.style == "bars" for series in panel.series))
    if isinstance(out, Path):
        out.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(out, dpi=130, format=None if isinstance(out, Path) else "svg")
    plt.close(drawn)


def draw_panel(axis: Any, panel: Panel) -> None:
    """Draw a panel on matplotlib's axes, without a legend."""
    for series in panel.drawn():
        if series.style in ("bars", "links"):
            _draw_bars(axis, series, panel)
        else:
            _draw_series(axis, series)
    # matplotlib would read a dollar sign as the start of a formula.
    axis.set_title(_plain(panel.title), loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(_plain(panel.x_label))
    axis.set_ylabel(_plain(panel.y_label))
    if panel.x_log:
        axis.set_xscale("log", base=panel.log_base)
    if panel.y_log:
        axis.set_yscale("log", base=panel.log_base)
    if panel.x_marks:
        axis.set_xticks(panel.x_marks, [f"{mark:g}" for mark in panel.x_marks])
        axis.set_xticks([], minor=True)
    if panel.rows:
        axis.margins(x=0)
        axis.autoscale_view()
        axis.set_ylim(len(panel.rows) - 0.4, -0.6)
        if len(panel.rows) <= MANY_ROWS:
            axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        return
    if panel.log_base == 10:
        _name_numbers(axis, panel)
    axis.grid(alpha=0.3)


def _name_numbers(axis: Any, panel: Panel) -> None:
    """Set tick labels on short logarithmic axes, which have at most two labels by default."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    sides: tuple[tuple[bool, Any, Ticks, Any], ...] = (
        (panel.x_log, axis.xaxis, panel.x_ticks, axis.set_xlim),
        (panel.y_log, axis.yaxis, "plain", axis.set_ylim),
    )
    for log, scale, ticks, hold in sides:
        low, high = scale.get_view_interval()
        if log and high < SHORT * low:
            hold(low, high)  # keep matplotlib from widening it to the ticks
            digits = max(3, 2 - math.floor(math.log10(1.0 - low / high)))
            form = human if ticks == "count" else f"{{:.{digits}g}}".format
            few = LogLocator(subs=(1.0, 2.0, 5.0))  # ticks at every digit overlap near the end
            there = sum(low <= place <= high for place in few.tick_values(low, high))
            scale.set_major_locator(few if there >= FEW_TICKS else MaxNLocator(FEW_TICKS + 2))
            scale.set_minor_locator(NullLocator())
            scale.set_major_formatter(FuncFormatter(lambda x, _, form=form: form(x)))


def _legend(axis: Any, *, above: bool) -> None:
    lines, names = axis.get_legend_handles_labels()
    first = dict(zip(reversed(names), reversed(lines), strict=True))
    kept = list(dict.fromkeys(names))
    if above:
        stride = -(-len(kept) // NAMED)
        kept = [name for i, name in enumerate(kept) if i % stride == 0 or i == len(kept) - 1]
        axis.figure.legend(
            [first[name] for name in kept], kept, fontsize=8, ncols=len(kept),
            loc="outside upper right", frameon=False,
        )  # fmt: skip
    elif names:
        more = len(kept) - NAMED
        kept = kept[:NAMED]
        title = f"and {more} more" if more > 0 else None
        axis.legend([first[name] for name in kept], kept, fontsize=7, title=title, title_fontsize=7)


def _draw_series(axis: Any, series: Series) -> None:
    faint = series.layer == "recorded"
    name = _plain(shortened(series.name)) if series.named and not faint else "_"
    if series.style == "band":
        axis.fill_between(
            series.x, series.low, series.high, color=series.colour, alpha=0.18, linewidth=0
        )
    elif series.style in MARKERS:
        marker: dict[str, Any] = {"marker": MARKERS[series.style], "ms": SIZES[series.style]}
        if series.style == "star":
            marker |= {"mec": "black", "mew": 0.6}
        if series.low is not None and series.high is not None:
            ends = [series.y - series.low, series.high - series.y]
            axis.errorbar(series.x, series.y, yerr=ends, fmt="none", ecolor=series.colour, lw=1)
        alpha = FAINT if faint else 1.0
        axis.plot(
            series.x, series.y, ls="none", color=series.colour, alpha=alpha, label=name, **marker
        )
    else:
        style: dict[str, Any] = {"ls": DASHES.get(series.style, "-"), "lw": 0.6 if faint else 1.5}
        style["alpha"] = FAINT if faint else 1.0
        points = {"marker": "o", "ms": 3} if series.style == "joined" else {}
        axis.plot(series.x, series.y, color=series.colour, label=name, **style, **points)


def _draw_bars(axis: Any, series: Series, panel: Panel) -> None:
    """Draw bars along x, one collection for each series, and links along y."""
    from matplotlib.collections import LineCollection, PolyCollection

    few = len(panel.rows) <= MANY_ROWS
    ends = zip(series.x, series.y, series.low, series.high, strict=True)  # type: ignore[arg-type]
    if series.style == "links":
        lines = [[(x, low), (x, high)] for x, _, low, high in ends]
        axis.add_collection(
            LineCollection(lines, colors=series.colour, linewidths=0.8 if few else 0.4)
        )
        return
    half = 0.4 if few else 0.5
    corners = [
        [(low, y - half), (high, y - half), (high, y + half), (low, y + half)]
        for _, y, low, high in ends
    ]
    axis.add_collection(
        PolyCollection(
            corners,
            facecolors=series.colour,
            alpha=0.55 if series.pale else 0.95,
            edgecolors="white",
            linewidths=0.3,
            label=_plain(series.name) if series.named else "_",
        )
    )


def _plain(text: str) -> str:
    """Return text without formulas or a leading underscore, which would hide a legend entry."""
    escaped = text.replace("$", r"\$")
    return " " + escaped if escaped.startswith("_") else escaped
