"""Figures as plain data: ``drawing.py`` draws them, and a report's page draws the same."""

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
"""Characters of a name in a legend or a title, at most."""

POINTS = 500
"""A curve is drawn with at most this many points."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito's colours, which the colour-blind can tell apart, in an order for thin lines; their
yellow, too light on white, is a brown."""

GREY = "#777777"


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, or set of points, with what belongs to it.

    ``run``: the number of the run whose check box shows and hides it (None: always shown).
    ``layer``: ``recorded`` or ``smooth`` where the page offers the choice. ``low`` and ``high``:
    ends of a band, or of error bars of points; of ``links`` too, which are thin lines along y;
    of ``bars`` along x, each in the row ``y``, the pale ones half transparent. ``notes``: a text
    for each point, shown with it. ``named``: whether a legend names it.
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
    """One pair of axes. Labels give the unit.

    ``x_ticks``: how numbers of a logarithmic x axis are written in a page: 20k, 10⁴, or 0.002.
    In pictures alone: ``log_base`` of the ticks, ``x_marks``: the only numbers on the x axis,
    ``rows``: names of the rows 0, 1, ... of bars, from above.
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
        """Return the series as they are drawn, without those of which nothing would be seen.

        A line or a band of one point has no extent: it is drawn as a point, with its interval.
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
        """Which points are on the axes: finite, and above 0 on a logarithmic one."""
        seen: NDArray[np.bool_] = np.isfinite(one.x) & np.isfinite(one.y)
        for log, values in ((self.x_log, one.x), (self.y_log, one.y)):
            if log:
                seen &= values > 0.0
        return seen


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels side by side. ``key``: name of the PNG and of the place in the page.

    ``legend``: whether series are named in each panel; figures of runs need none in the page, as
    the list of runs is their legend, and one in a picture. ``size``: of a picture, in inches.
    """

    key: str
    panels: tuple[Panel, ...]
    text: str = ""
    legend: bool = False
    size: tuple[float, float] | None = None


def rows_of(count: int, most: int) -> list[int]:
    """Return how many of ``count`` panels stand in each row: at most ``most``, as even as can be.

    A row with fewer panels than another has wider ones, so that none is half empty.
    """
    rows = -(-count // most)
    return [count // rows + (row < count % rows) for row in range(rows)]


def shortened(name: str) -> str:
    """Return a name that fits into a legend or a title: what is too long loses its middle."""
    return name if len(name) <= NAME else f"{name[: NAME // 2]}…{name[1 - NAME // 2 :]}"


def above_zero(series: Sequence[Series]) -> bool:
    """Return whether a logarithmic axis would show every finite y."""
    return all((one.y[np.isfinite(one.y)] > 0.0).all() for one in series)


def star(name: str, x: float, y: float, colour: str, **more: Any) -> Series:
    """Return one marked point."""
    return Series(name, np.array([x]), np.array([y]), "star", colour, **more)


def known(x: Column, y: Column) -> tuple[Column, Column]:
    """Return the points at which both are finite."""
    kept = np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def thin(x: Column, *ys: Column, log: bool = False, most: int = POINTS) -> tuple[Column, ...]:
    """Return at most ``most`` of the points, the first and the last among them.

    ``log``: spread evenly over log x, as the eye sees them, else evenly over the points.
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
    """Return at each point the mean of the last ``share`` of the curve so far.

    On a logarithmic axis windows look equally wide; one of a fixed number of rows would drag the
    steep beginning along.
    """
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = ends - np.maximum(np.round(ends * share).astype(np.intp), 1)
    means: Column = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def colours(sizes: Sequence[float]) -> list[str]:
    """Return a colour for each run, or for each of anything that has a size.

    Up to eight: as many hues. More: from dark blue (small) to yellow-green (large) by size, and of
    equal sizes by place, so that no two are the same.
    """
    if len(sizes) <= len(PALETTE):
        return list(PALETTE[: len(sizes)])
    ranks = sorted(range(len(sizes)), key=lambda place: sizes[place])
    return ordered([float(ranks.index(place)) for place in range(len(sizes))])


def ordered(sizes: Sequence[float]) -> list[str]:
    """Return colours that go from dark to light with the rank of the size."""
    ranks = sorted(set(sizes))
    last = max(1, len(ranks) - 1)
    return [_between(ranks.index(size) / last) for size in sizes]


_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (74, 175, 85), (190, 178, 20))


def _between(share: float) -> str:
    """A colour of a scale like viridis, whose lightness rises evenly; without its pale end."""
    place = share * (len(_STOPS) - 1)
    first = min(int(place), len(_STOPS) - 2)
    part = place - first
    mixed = [
        round(a + (b - a) * part) for a, b in zip(_STOPS[first], _STOPS[first + 1], strict=True)
    ]
    return "#" + "".join(f"{value:02x}" for value in mixed)
