"""Figures as plain data, drawn by ``drawing.py`` and by the HTML page of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Style = Literal[
    "line", "dashed", "dotted", "joined", "point", "dots", "star", "cross", "band", "bars", "links"
]
Ticks = Literal["count", "power", "plain"]

NAME = 42
"""Maximum number of characters of a name in a legend or a title."""

POINTS = 500
"""Maximum number of points that are drawn for a curve."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's palette for colour-blind readers, in an order for thin lines.

Their yellow is too light on white and is replaced by a brown.
"""

GREY = "#777777"


@dataclass(frozen=True, slots=True)
class Series:
    """One curve or set of points, with its attributes.

    ``run``: number of the run whose check box shows and hides the series (None: always shown).
    ``layer``: ``recorded`` or ``smooth`` where the page offers the choice. ``low`` and ``high``:
    ends of a band or of error bars; of ``links``, thin lines along y; of ``bars`` along x, each in
    the row ``y``. ``pale``: True for half-transparent bars. ``notes``: a text for each point, shown
    with the point. ``named``: True if a legend names the series.
    """

    name: str
    x: Column
    y: Column
    style: Style = "line"
    colour: str = PALETTE[0]
    run: int | None = None
    layer: Literal["recorded", "smooth"] | None = None
    low: Column | None = None
    high: Column | None = None
    notes: tuple[str, ...] | None = None
    named: bool = True
    pale: bool = False

    def __post_init__(self) -> None:
        for other in (self.y, self.low, self.high):
            assert other is None or other.shape == self.x.shape, (self.name, other.shape)
        assert self.notes is None or len(self.notes) == len(self.x), self.name
        assert self.low is not None or self.style not in ("band", "bars", "links"), self.name


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. Labels include the unit.

    ``x_ticks``: number format of a logarithmic x axis in a page: 20k, 10⁴, or 0.002. Only in
    picture files: ``log_base`` of the ticks, ``x_marks``: the only numbers on the x axis, ``rows``:
    names of the rows 0, 1, ... of bars, from the top.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    x_ticks: Ticks = "count"
    log_base: int = 10
    x_marks: tuple[float, ...] = ()
    rows: tuple[str, ...] = ()

    def drawn(self) -> tuple[Series, ...]:
        """Return the drawn series, without series that have no visible point.

        A line or a band of a single point has no extent and is drawn as a point with its interval.
        """
        shown = []
        for one in self.series:
            count = int(self._visible(one).sum())
            if count == 1 and one.style in ("line", "dashed", "dotted", "joined", "band"):
                one = replace(one, style="point")
            if count:
                shown.append(one)
        return tuple(shown)

    def _visible(self, one: Series) -> NDArray[np.bool_]:
        """Return a mask of the points on the axes: finite, and above 0 on a logarithmic axis."""
        seen: NDArray[np.bool_] = np.isfinite(one.x) & np.isfinite(one.y)
        for log, values in ((self.x_log, one.x), (self.y_log, one.y)):
            if log:
                seen &= values > 0.0
        return seen


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels next to each other. ``key``: name of the PNG file and of the section in the page.

    ``legend``: True if each panel names its series. A figure of runs needs no legend in the page,
    where the list of runs is the legend, and one legend in a picture file. ``size``: of a picture,
    in inches.
    """

    key: str
    panels: tuple[Panel, ...]
    text: str = ""
    legend: bool = False
    size: tuple[float, float] | None = None


def rows_of(count: int, most: int) -> list[int]:
    """Return the number of panels in each row: at most ``most``, as even as possible.

    A row with fewer panels has wider panels, so that no row is half empty. For example,
    ``rows_of(5, 3)`` returns ``[3, 2]``.
    """
    rows = -(-count // most)
    return [count // rows + (row < count % rows) for row in range(rows)]


def shortened(name: str) -> str:
    """Return a name that fits into a legend or a title; a long name loses its middle."""
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"


def above_zero(series: Sequence[Series]) -> bool:
    """Return True if a logarithmic axis would show every finite y."""
    return all((one.y[np.isfinite(one.y)] > 0.0).all() for one in series)


def star(name: str, x: float, y: float, colour: str, **more: Any) -> Series:
    """Return a series of one star marker."""
    return Series(name, np.array([x]), np.array([y]), "star", colour, **more)


def known(x: Column, y: Column) -> tuple[Column, Column]:
    """Return the points with finite x and y."""
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def thin(x: Column, *ys: Column, log: bool = False, most: int = POINTS) -> tuple[Column, ...]:
    """Return at most ``most`` of the points, including the first and the last.

    ``log``: True for points spread evenly over log x, as on a logarithmic axis; otherwise
    evenly over the rows. For example, ``thin(steps, losses, most=100)``.
    """
    if len(x) <= most:
        return (x, *ys)
    if log and x[0] > 0.0:
        wanted = np.geomspace(x[0], x[-1], most)
        rows = np.searchsorted(x, wanted * (1.0 - 1e-12))
    else:
        rows = np.linspace(0, len(x) - 1, most).round().astype(np.intp)
    rows = np.unique(np.append(np.clip(rows, 0, len(x) - 1), (0, len(x) - 1)))[:most]
    rows[-1] = len(x) - 1
    return (x[rows], *(y[rows] for y in ys))


def smooth(values: Column, share: float) -> Column:
    """Return, at each point, the mean of the last ``share`` of the curve up to this point.

    On a logarithmic axis these windows look equally wide; a window of a fixed number of rows would
    average in the steep beginning.
    """
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.maximum(np.round(ends * share).astype(np.intp), 1)
    means: Column = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def colours(sizes: Sequence[float]) -> list[str]:
    """Return a colour for each run, or for each item that has a size.

    Up to eight items: as many hues. More items: from dark blue (small) to yellow-green (large) by
    size, and by index among equal sizes, so that all colours differ.
    """
    if len(sizes) <= len(PALETTE):
        return list(PALETTE[: len(sizes)])
    ranks = sorted(range(len(sizes)), key=lambda place: sizes[place])
    return ordered([float(ranks.index(place)) for place in range(len(sizes))])


def ordered(sizes: Sequence[float]) -> list[str]:
    """Return colours from dark to light by size; equal sizes get equal colours."""
    ranks = sorted(set(sizes))
    last = max(1, len(ranks) - 1)
    return [_between(ranks.index(size) / last) for size in sizes]


_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (74, 175, 85), (190, 178, 20))


def _between(share: float) -> str:
    """Return a colour of a scale like viridis with evenly rising lightness but no pale end."""
    place = share * (len(_STOPS) - 1)
    first = min(int(place), len(_STOPS) - 2)
    part = place - first
    mixed = [
        round(a + (b - a) * part) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True)
    ]
    return "#" + "".join(f"{value:02x}" for value in mixed)
