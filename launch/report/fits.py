"""Figures of fitted laws: curves with bands, predicted against measured, residuals."""

# n rows

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.report.figure import (
    GREY,
    PALETTE,
    Column,
    Figure,
    Panel,
    Section,
    Series,
    Table,
    ordered,
    thin,
)
from allometry.launch.report.inputs import Inputs
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.store import StoredFit
from allometry.laws.ladder import Prediction
from allometry.laws.observations import Observations

SLICES = 12
"""A law of two inputs is drawn as a curve for each value of one, up to so many."""
ALONG = 80
HEAD = ("fit", "parameter", "value", "95 % interval", "unit")
TARGET_HEAD = (
    "ladder",
    "law",
    "target",
    "predicted",
    "95 % interval",
    "made",
    "measured",
    "error",
    "inside the interval",
)


def fits(inputs: Inputs) -> Section:
    """A figure for each fit, its parameters, and targets that were predicted before training."""
    title = "Fitted laws"
    targets = _targets(inputs.predictions)
    if not inputs.fits and not inputs.predictions:
        why = "no fit was given (--fit) and no ladder here has a fit.json"
        return Section(key="fits", title=title, text="", absent=why)
    figures, rows = [], []
    for number, (path, stored) in enumerate(inputs.fits, start=1):
        own = [one for folder, one in inputs.predictions if folder == path.parent]
        name = f"fit {number}" if len(inputs.fits) > 1 else "fit"
        figures.append(_figure(f"fit-{number}", path, stored, own))
        rows += _parameters(name, stored)
    tables = [Table(head=HEAD, rows=tuple(rows))] if rows else []
    if targets:
        caption = "What ladders predicted, in nats per token; error = predicted/measured - 1."
        tables.append(Table(head=TARGET_HEAD, rows=targets, caption=caption))
    notes = [f"{folder}: {said}." for folder, one in inputs.predictions for said in one.warnings]
    text = (
        "Dots are measured, lines the law, bands its 95 % interval over bootstrap samples of "
        "groups (the uncertainty of the parameters). A star is a target that was held out."
    )
    return Section(
        key="fits",
        title=title,
        text=text,
        figures=tuple(figures),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def _figure(key: str, path: Path, stored: StoredFit, targets: Sequence[Prediction]) -> Figure:
    fit = stored.fit
    panels = [*_law(stored), _against(stored, targets), _residuals(fit)]
    return Figure(key=key, text=_sentence(path, stored), panels=tuple(panels), legend=True)


def _sentence(path: Path, stored: StoredFit) -> str:
    fit, found = stored.fit, stored.fit.certificate
    groups = len(set(fit.observations.groups))
    parts = [
        f"{fit.form.name} ({path}): {fit.form.equation}, fitted to {len(fit.observations)} rows of "
        f"{groups} groups. {found.agreeing} of {found.starts} starts found this optimum."
    ]
    if found.at_bounds:
        parts.append(f"At a bound: {', '.join(found.at_bounds)}.")
    if found.unidentified:
        parts.append(f"NOT identified by the data: {', '.join(found.unidentified)}.")
    if stored.bootstrap is None:
        parts.append(
            "The file has no bootstrap, so there are no bands (allometry fit --bootstraps)."
        )
    counted = fit.observations.conventions
    said = [f"{name}: {counted[name]}" for name in ("N", "loss") if name in counted]
    return " ".join([*parts, *(f"{one}." for one in said)])


def _label(fit: Fit) -> str:
    return f"{fit.form.target.name} ({fit.form.target.unit})"


def _law(stored: StoredFit) -> list[Panel]:
    """The law as curves, where it can be drawn over one input; else nothing."""
    fit = stored.fit
    if fit.observations.curves:
        return [_curves(stored)]
    names = [variable.name for variable in fit.form.inputs]
    if not 1 <= len(names) <= 2 or any(n not in fit.observations.columns for n in names):
        return []
    distinct = {name: np.unique(fit.observations[name]) for name in names}
    other, along = (
        sorted(names, key=lambda name: (len(distinct[name]), names.index(name)))[-2:]
        if (len(names) == 2)
        else ("", names[0])
    )
    if other and len(distinct[other]) > SLICES:
        return []
    try:
        return [_slices(stored, along, other, distinct)]
    except UserError:
        return []  # the law needs more columns than its inputs to be drawn between the rows


def _slices(stored: StoredFit, along: str, other: str, distinct: dict[str, Column]) -> Panel:
    fit = stored.fit
    units = {variable.name: variable for variable in fit.form.inputs}
    x_n, y_n = fit.observations[along], fit.observations[fit.form.target.name]
    values = distinct[other] if other else np.array([np.nan])
    shades = ordered(values.tolist()) if other else [PALETTE[0]]
    log = bool((x_n > 0.0).all() and x_n.max() > 3.0 * x_n.min())
    grid = (np.geomspace if log else np.linspace)(x_n.min(), x_n.max(), ALONG)
    series: list[Series] = []
    for value, colour in zip(values, shades, strict=True):
        rows = fit.observations[other] == value if other else np.ones(len(x_n), bool)
        name = f"{other} {value:.4g}" if other else "measured"
        columns = {along: grid, **({other: np.full(ALONG, value)} if other else {})}
        series += _drawn(stored, Observations.of(columns), grid, name, colour)
        series.append(
            Series(
                name=f"{name}, measured",
                x=x_n[rows],
                y=y_n[rows],
                style="dots",
                colour=colour,
                named=False,
            )
        )
    return Panel(
        title=f"{fit.form.name} over {along}",
        x_label=f"{along} ({units[along].unit})",
        y_label=_label(fit),
        x_log=log,
        series=tuple(series),
    )


def _drawn(
    stored: StoredFit, rows: Observations, x: Column, name: str, colour: str
) -> list[Series]:
    """The law at these rows as a band (given a bootstrap) and a line."""
    y = stored.fit.predict(rows)
    found = [Series(name=name, x=x, y=y, colour=colour)]
    if stored.bootstrap is not None:
        low, high = stored.bootstrap.predict_interval(rows)
        band = Series(
            name=name, x=x, y=y, low=low, high=high, style="band", colour=colour, named=False
        )
        found.insert(0, band)
    return found


def _curves(stored: StoredFit) -> Panel:
    """A law of whole curves: each group's rows over their steps."""
    fit = stored.fit
    groups = list(dict.fromkeys(fit.observations.groups))[:SLICES]
    shades = [PALETTE[i % len(PALETTE)] for i in range(len(groups))]
    series: list[Series] = []
    for group, colour in zip(groups, shades, strict=True):
        mask = np.array([one == group for one in fit.observations.groups])
        rows = fit.observations.take(mask)
        steps = rows["step"]
        chosen = thin(steps, np.arange(len(steps), dtype=np.float64))[-1].astype(np.intp)
        few = rows.take(chosen)
        series.append(
            Series(
                name=f"{group}, measured",
                x=steps[chosen],
                y=few[fit.form.target.name],
                style="dots",
                colour=GREY,
                named=False,
            )
        )
        series += _drawn(stored, few, steps[chosen], group, colour)
    return Panel(
        title=f"{fit.form.name} over steps",
        x_label="step",
        y_label=_label(fit),
        series=tuple(series),
    )


def _against(stored: StoredFit, targets: Sequence[Prediction]) -> Panel:
    """Measured against predicted, with the line where both are equal, and held-out targets."""
    fit = stored.fit
    predicted, measured = fit.predict(fit.observations), fit.observations[fit.form.target.name]
    done = [one for one in targets if one.measured is not None]
    ends = [*predicted, *measured, *(one.predicted for one in done)]
    ends += [one.measured for one in done if one.measured is not None]
    line = np.array([np.nanmin(ends), np.nanmax(ends)])
    x, y = thin(predicted, measured)
    series = [
        Series(name="equal", x=line, y=line, style="dashed", colour=GREY, named=False),
        Series(
            name="fitted rows", x=x, y=y, style="dots", colour=PALETTE[0], notes=_names(fit, len(x))
        ),
    ]
    for one in done:
        assert one.measured is not None
        series.append(
            Series(
                name=f"target {one.target.get('run')}, held out",
                x=np.array([one.predicted]),
                y=np.array([one.measured]),
                style="star",
                colour=PALETTE[1],
            )
        )
    unit = f"({fit.form.target.unit})"
    return Panel(
        title="measured against predicted",
        x_label=f"predicted {fit.form.target.name} {unit}",
        y_label=f"measured {fit.form.target.name} {unit}",
        series=tuple(series),
    )


def _names(fit: Fit, number: int) -> tuple[str, ...] | None:
    """Groups of the rows, where all rows are drawn."""
    return fit.observations.groups if number == len(fit.observations) else None


def _residuals(fit: Fit) -> Panel:
    predicted, measured = fit.predict(fit.observations), fit.observations[fit.form.target.name]
    if fit.form.residual == "log":
        errors, unit = 100.0 * (predicted / measured - 1.0), "predicted/measured - 1 (%)"
    else:
        errors, unit = predicted - measured, f"predicted - measured ({fit.form.target.unit})"
    x, y = thin(predicted, errors)
    ends = np.array([x.min(), x.max()])
    return Panel(
        title="residuals",
        x_label=f"predicted {_label(fit)}",
        y_label=unit,
        series=(
            Series(name="0", x=ends, y=np.zeros(2), style="dashed", colour=GREY, named=False),
            Series(
                name="fitted rows",
                x=x,
                y=y,
                style="dots",
                colour=PALETTE[0],
                notes=_names(fit, len(x)),
            ),
        ),
    )


def _parameters(name: str, stored: StoredFit) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for parameter in stored.fit.form.parameters:
        interval = "–"
        if stored.bootstrap is not None:
            low, high = stored.bootstrap.interval(parameter.name)
            interval = f"{low:.4g} to {high:.4g}"
        value = f"{stored.fit.values[parameter.name]:.5g}"
        rows.append((name, parameter.name, value, interval, parameter.unit))
    return rows


def _targets(predictions: Sequence[tuple[Path, Prediction]]) -> tuple[tuple[str, ...], ...]:
    rows = []
    for folder, one in predictions:
        measured, error, inside = "not trained yet", "–", "–"
        if one.measured is not None and one.error is not None:
            measured, error = f"{one.measured:.4f}", f"{100.0 * one.error:+.2f} %"
            inside = "yes" if one.covered else "NO"
        made = {
            "planned": "before the target began",
            "partial": f"when the target was at step {one.target_step}",
            "done": "AFTER the target had ended",
        }[one.target_state]
        rows.append(
            (
                str(folder),
                one.law,
                str(one.target.get("run", "?")),
                f"{one.predicted:.4f}",
                f"{one.low:.4f} to {one.high:.4f}",
                made,
                measured,
                error,
                inside,
            )
        )
    return tuple(rows)
