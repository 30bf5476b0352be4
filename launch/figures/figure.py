"""Figures as plain data: ``drawing.py`` draws them, and a report's page draws the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Style = Literal["line", "dashed", "joined", "dots", "star", "cross", "band", "bars", "links"]
Ticks = Literal["count", "power", "plain"]

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

    Up to eight: as many hues. More: from dark blue (small) to yellow-green (large) by size, the
    same for equal sizes.
    """
    if len(sizes) <= len(PALETTE):
        return list(PALETTE[: len(sizes)])
    return ordered(sizes)


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
