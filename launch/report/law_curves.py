"""Panels of a fitted law as curves: over one of its inputs, or over the steps of runs."""

# n: rows

from __future__ import annotations

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.launch.figures.figure import GREY, PALETTE, Column, Panel, Series, ordered, thin
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.store import StoredFit
from allometry.laws.observations import Observations

SLICES = 12
"""Maximum number of values of the second input that are drawn as a curve each."""
RANGES = 6
"""Number of ranges with equally many rows, used for more values: a curve for each middle."""
ALONG = 80


def target_label(fit: Fit) -> str:
    """Return the name and unit of the law's target."""
    return f"{fit.form.target.name} ({fit.unit(fit.form.target.unit)})"


def law_panel(stored: StoredFit) -> tuple[Panel | None, str]:
    """Return a panel of the law with its band and the measured rows, or None, and a remark."""
    fit = stored.fit
    if fit.observations.curves:
        return _curves(stored)
    names = [variable.name for variable in fit.form.inputs]
    if not 1 <= len(names) <= 2 or any(n not in fit.observations.columns for n in names):
        return None, f"It reads {len(names)} inputs, so it is not drawn as curves over one."
    distinct = {name: len(np.unique(fit.observations[name])) for name in names}
    *others, along = sorted(names, key=lambda name: (distinct[name], names.index(name)))
    try:
        if not others:
            rows = np.ones(len(fit.observations), bool)
            return _slices(stored, along, "", [("measured", np.nan, rows)]), ""
        (other,) = others
        column = fit.observations[other]
        if distinct[other] <= SLICES:
            values = np.unique(column)
            slices = [
                (f"{other} = {_value(value)}", float(value), column == value) for value in values
            ]
            return _slices(stored, along, other, slices), ""
        panel = _slices(stored, along, other, _ranges(column, other))
        return panel, (
            f"{other} has {distinct[other]} values: curves are for the middle of {RANGES} "
            "ranges of it, and dots have the colour of their range."
        )
    except UserError as error:
        return None, f"It is not drawn as curves: {error}."


def _value(value: float) -> str:
    """Return a count with a suffix such as 1.5M, or a smaller number with four digits."""
    return human(value) if value >= 1000.0 else f"{value:.4g}"


Slice = tuple[str, float, np.ndarray[tuple[int], np.dtype[np.bool_]]]
"""Name, value of the other input, and mask of the rows of this slice."""


def _ranges(column: Column, other: str) -> list[Slice]:
    ends = np.quantile(column, np.linspace(0.0, 1.0, RANGES + 1))
    index = np.clip(np.searchsorted(ends, column, side="right") - 1, 0, RANGES - 1)
    slices = []
    for number in range(RANGES):
        rows = index == number
        if rows.any():
            middle = float(np.median(column[rows]))
            slices.append((f"{other} = {_value(middle)}", middle, rows))
    return slices


def _slices(stored: StoredFit, along: str, other: str, slices: list[Slice]) -> Panel:
    fit = stored.fit
    units = {variable.name: fit.unit(variable.unit) for variable in fit.form.inputs}
    x_n, y_n = fit.observations[along], fit.observations[fit.form.target.name]
    log = bool((x_n > 0.0).all() and x_n.max() > 3.0 * x_n.min())
    shades = ordered([value for _, value, _ in slices]) if other else [PALETTE[0]]
    series: list[Series] = []
    for (name, value, rows), colour in zip(slices, shades, strict=True):
        x = x_n[rows]
        grid = (np.geomspace if log else np.linspace)(x.min(), x.max(), ALONG)
        columns = {along: grid, **({other: np.full(ALONG, value)} if other else {})}
        series += _drawn(stored, Observations.of(columns), grid, name, colour)
        series.append(_dots(f"{name}, measured", x, y_n[rows], colour))
    title, x_label = f"{fit.form.name} over {along}", f"{along} ({units[along]})"
    return Panel(title, x_label, target_label(fit), tuple(series), x_log=log)


def _dots(name: str, x: Column, y: Column, colour: str) -> Series:
    return Series(name, x, y, "dots", colour, named=False)


def _drawn(
    stored: StoredFit, rows: Observations, x: Column, name: str, colour: str
) -> list[Series]:
    """Return the law at these rows as a line, with a band if the fit has a bootstrap."""
    y = stored.fit.predict(rows)
    line = Series(name, x, y, colour=colour)
    if stored.bootstrap is None:
        return [line]
    low, high = stored.bootstrap.predict_interval(rows)
    return [Series(name, x, y, "band", colour, low=low, high=high, named=False), line]


def _curves(stored: StoredFit) -> tuple[Panel, str]:
    """Return a panel of a law of curves: each group's rows over their steps."""
    fit = stored.fit
    groups = list(dict.fromkeys(fit.observations.groups))
    series: list[Series] = []
    for number, group in enumerate(groups[:SLICES]):
        colour = PALETTE[number % len(PALETTE)]
        rows = fit.observations.take([g == group for g in fit.observations.groups])
        steps = rows["step"]
        few = rows.take(thin(steps, np.arange(len(steps), dtype=np.float64))[1].astype(np.intp))
        measured = few[fit.form.target.name]
        series.append(_dots(f"{group}, measured", few["step"], measured, GREY))
        series += _drawn(stored, few, few["step"], group, colour)
    drawn = f"The first {SLICES} of {len(groups)} groups are drawn."
    said = drawn if len(groups) > SLICES else ""
    return Panel(f"{fit.form.name} over steps", "step", target_label(fit), tuple(series)), said
