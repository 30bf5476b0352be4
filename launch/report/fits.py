"""Figures of fitted laws: curves with bands, predicted against measured, residuals."""

# n: rows

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from allometry.launch.figures.figure import (
    GREY,
    PALETTE,
    POINTS,
    Column,
    Figure,
    Panel,
    Series,
    star,
    thin,
)
from allometry.launch.report.inputs import Inputs
from allometry.launch.report.law_curves import law_panel, target_label
from allometry.launch.report.section import Section, Table
from allometry.launch.text import number
from allometry.laws.fit.store import StoredFit
from allometry.laws.ladder import Prediction

HEAD = ("fit", "parameter", "value", "95 % interval", "unit")
TARGET_HEAD = (
    "ladder", "law", "target", "predicted", "95 % interval", "made", "measured", "error",
    "inside the interval",
)  # fmt: skip


def fits(inputs: Inputs) -> Section:
    """Return a figure for each fit, its parameters, and targets predicted before their training."""
    title = "Fitted laws"
    if not inputs.fits and not inputs.predictions:
        why = "no fit was given (--fit) and no ladder here has a fit.json"
        return Section("fits", title, absent=why)
    figures, rows = [], []
    for place, (path, stored) in enumerate(inputs.fits, start=1):
        own = [one for folder, one in inputs.predictions if folder == path.parent]
        name = f"fit {place}" if len(inputs.fits) > 1 else "fit"
        figures.append(_figure(place, path, stored, own, name))
        rows += _parameters(name, stored)
    tables = [Table(HEAD, tuple(rows))] if rows else []
    if inputs.predictions:
        caption = "What ladders predicted, in nats per token; error = predicted/measured - 1."
        targets = tuple(_target(folder, one) for folder, one in inputs.predictions)
        tables.append(Table(TARGET_HEAD, targets, caption))
    notes = [f"{folder}: {said}." for folder, one in inputs.predictions for said in one.warnings]
    text = (
        "Dots are measured, lines the law, bands its 95 % interval over bootstrap samples of "
        "groups (the uncertainty of the parameters). Crosses are rows as predicted by a fit "
        "without them; a star is a target that was trained after it was predicted."
    )
    return Section("fits", title, text, tuple(figures), tuple(tables), tuple(notes))


def _figure(
    place: int, path: Path, stored: StoredFit, targets: Sequence[Prediction], name: str
) -> Figure:
    law, said = law_panel(stored)
    panels = (*([law] if law else []), _against(stored, targets), _residuals(stored))
    text = f"{name.capitalize()}: {_sentence(path, stored)} {said}".rstrip()
    return Figure(f"fit-{place}", panels, text, legend=True)


def _sentence(path: Path, stored: StoredFit) -> str:
    fit, certificate = stored.fit, stored.fit.certificate
    groups, rows = len(set(fit.observations.groups)), len(fit.observations)
    drawn = f" ({POINTS} of them are drawn)" if rows > POINTS else ""
    parts = [
        f"{fit.form.name} ({path}): {fit.form.equation}, fitted to {rows} rows of "
        f"{groups} groups{drawn}. {certificate.agreeing} of {certificate.starts} starts found this "
        "optimum."
    ]
    if certificate.at_bounds:
        parts.append(f"At a bound: {', '.join(certificate.at_bounds)}.")
    if fit.unidentified:
        parts.append(f"NOT identified by the data: {', '.join(fit.unidentified)}.")
    if stored.bootstrap is None:
        parts.append(
            "The file has no bootstrap, so there are no bands (allometry fit --bootstraps)."
        )
    if (held_out := _held_out(stored)) is not None:
        parts.append(held_out[2])
    notes = stored.extra.get("notes")
    if isinstance(notes, list):
        parts += [f"Note: {note}." for note in notes]
    counted = fit.observations.conventions
    said = [f"{name}: {counted[name]}" for name in ("N", "loss") if name in counted]
    return " ".join([*parts, *(f"{one}." for one in said)])


def _held_out(stored: StoredFit) -> tuple[Column, Column, str] | None:
    """Return predicted and measured values of held-out rows, with their errors as a sentence."""
    kept = stored.extra.get("held_out")
    if not isinstance(kept, dict):
        return None
    try:
        predicted, measured = (np.array(kept[key], np.float64) for key in ("predicted", "measured"))
        mean, most, how = float(kept["mean"]), float(kept["max"]), str(kept["how"])
    except (KeyError, TypeError, ValueError):
        return None
    form = "{:.3%}" if kept.get("relative") else "{:.4g}"
    said = f"Held-out error: {form.format(mean)} in the mean, {form.format(most)} at most ({how})."
    return predicted, measured, said


def _points(stored: StoredFit, y_of: Callable[[Column, Column], Column]) -> list[Series]:
    """Return fitted and held-out rows over the prediction; y is ``y_of(predicted, measured)``."""
    fit = stored.fit
    predicted, measured = fit.predict(fit.observations), fit.observations[fit.form.target.name]
    x, y = thin(predicted, y_of(predicted, measured))
    groups = fit.observations.groups if len(x) == len(fit.observations) else None
    series = [Series("fitted rows", x, y, "dots", PALETTE[0], notes=groups)]
    if (held_out := _held_out(stored)) is not None:
        x, y = thin(held_out[0], y_of(*held_out[:2]))
        series.append(Series("held out", x, y, "cross", PALETTE[4]))
    return series


def _against(stored: StoredFit, targets: Sequence[Prediction]) -> Panel:
    """Return measured against predicted values, with held-out rows and the line of equality."""
    series = _points(stored, lambda predicted, measured: measured)
    for one in targets:
        if one.measured is not None:
            name = f"target {one.target.get('run', '?')}"
            series.append(star(name, one.predicted, one.measured, PALETTE[1]))
    ends = np.concatenate([part for one in series for part in (one.x, one.y)])
    line = np.array([np.nanmin(ends), np.nanmax(ends)])
    equal = Series("equal", line, line, "dashed", GREY, named=False)
    labels = [f"{which} {target_label(stored.fit)}" for which in ("predicted", "measured")]
    return Panel("measured against predicted", *labels, (equal, *series))  # type: ignore[call-arg]


def _residuals(stored: StoredFit) -> Panel:
    fit = stored.fit
    relative = fit.form.residual == "log"

    def errors(predicted: Column, measured: Column) -> Column:
        return 100.0 * (predicted / measured - 1.0) if relative else predicted - measured

    predicted = fit.predict(fit.observations)
    ends = np.array([predicted.min(), predicted.max()])
    zero = Series("0", ends, np.zeros(2), "dashed", GREY, named=False)
    unit = fit.unit(fit.form.target.unit)
    said = "predicted/measured - 1 (%)" if relative else f"predicted - measured ({unit})"
    x_label, series = f"predicted {target_label(fit)}", (zero, *_points(stored, errors))
    return Panel("residuals", x_label, said, series)


def _parameters(name: str, stored: StoredFit) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for parameter in stored.fit.form.parameters:
        interval = "–"
        if stored.bootstrap is not None:
            low, high = stored.bootstrap.interval(parameter.name)
            interval = f"{number(low, 4)} to {number(high, 4)}"
        value = number(stored.fit.values[parameter.name])
        rows.append((name, parameter.name, value, interval, stored.fit.unit(parameter.unit)))
    return rows


def _target(folder: Path, one: Prediction) -> tuple[str, ...]:
    measured = ["not trained yet", "–", "–"]
    if one.measured is not None and one.error is not None:
        inside = {True: "yes", False: "NO", None: "–"}[one.covered]
        measured = [f"{one.measured:.4f}", f"{100.0 * one.error:+.2f} %", inside]
    made = {
        "planned": "before the target began",
        "partial": f"when the target was at step {one.target_step}",
        "done": "AFTER the target had ended",
    }[one.target_state]
    interval = "none: the law is not identified"
    if one.low is not None and one.high is not None:
        interval = f"{one.low:.4f} to {one.high:.4f}"
    said = [f"{one.predicted:.4f}", interval, made]
    return (str(folder), one.law, str(one.target.get("run", "?")), *said, *measured)
