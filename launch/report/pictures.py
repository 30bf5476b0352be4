"""Figures as PNG files, drawn by matplotlib from the same data as the page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from allometry.launch.report.figure import Figure, Panel, Series

MARKERS = {"dots": "o", "star": "*", "cross": "x"}
SIZES = {"dots": 3.0, "star": 12.0, "cross": 7.0}
NAMED = 12
"""A legend names at most this many things."""


def write_pictures(figures: list[Figure], folder: Path) -> list[Path]:
    """Write ``<key>.png`` for each figure and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        path = folder / f"{figure.key}.png"
        _draw(figure, path)
        written.append(path)
    return written


def _draw(figure: Figure, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    size = (6.5 * columns, 4.3 * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(figure.panels) :]:
        axis.set_visible(False)
    for number, (axis, panel) in enumerate(zip(axes.flat, figure.panels, strict=False)):
        _panel(axis, panel)
        if figure.legend or number == 0:  # else all panels show the same runs
            _legend(axis)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def _panel(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    for series in panel.series:
        _series(axis, series)
    # A dollar sign would begin a formula.
    axis.set_title(_plain(panel.title), loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel(_plain(panel.x_label))
    axis.set_ylabel(_plain(panel.y_label))
    if panel.x_log:
        axis.set_xscale("log")
    if panel.y_log:
        axis.set_yscale("log")
    for log, scale, limits in (
        (panel.x_log, axis.xaxis, axis.get_xlim()),
        (panel.y_log, axis.yaxis, axis.get_ylim()),
    ):
        if log and limits[1] < 10.0 * limits[0]:  # a log axis alone would name one number, or none
            scale.set_major_locator(MaxNLocator(7))
            scale.set_minor_locator(NullLocator())
            scale.set_major_formatter("{x:.3g}")
    axis.grid(alpha=0.3)


def _legend(axis: Any) -> None:
    lines, names = axis.get_legend_handles_labels()
    if names:
        first = dict(zip(reversed(names), reversed(lines), strict=True))
        kept = list(dict.fromkeys(names))[:NAMED]
        more = len(first) - len(kept)
        title = f"and {more} more" if more else None
        axis.legend([first[name] for name in kept], kept, fontsize=7, title=title, title_fontsize=7)


def _series(axis: Any, series: Series) -> None:
    name = _plain(series.name) if series.named else "_"
    if series.style == "band":
        axis.fill_between(
            series.x, series.low, series.high, color=series.colour, alpha=0.18, linewidth=0
        )
    elif series.style in MARKERS:
        marker = {
            "marker": MARKERS[series.style],
            "ms": SIZES[series.style],
            "color": series.colour,
            "label": name,
        }
        if series.low is None or series.high is None:
            axis.plot(series.x, series.y, ls="none", **marker)
        else:
            ends = [series.y - series.low, series.high - series.y]
            axis.errorbar(series.x, series.y, yerr=ends, fmt="none", ecolor=series.colour, lw=1)
            axis.plot(series.x, series.y, ls="none", **marker)
    elif series.layer == "recorded":
        axis.plot(series.x, series.y, color=series.colour, lw=0.6, alpha=0.35)
    else:
        dashes = "--" if series.style == "dashed" else "-"
        points = "o" if series.style == "joined" else None
        axis.plot(
            series.x,
            series.y,
            color=series.colour,
            lw=1.5,
            ls=dashes,
            label=name,
            marker=points,
            ms=3,
        )


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: no formulas, and no name that hides from the legend."""
    escaped = text.replace("$", r"\$")
    return " " + escaped if escaped.startswith("_") else escaped
