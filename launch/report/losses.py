"""Figures of losses: over tokens and FLOPs, of each source, and forecasts."""

from __future__ import annotations

import numpy as np

from allometry.launch.figures.branches import stages_begin
from allometry.launch.figures.figure import (
    Column,
    Figure,
    Panel,
    Series,
    Ticks,
    above_zero,
    known,
    smooth,
    star,
    thin,
)
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section

LOSS = "loss (nats per token)"
NO_RUNS = "no run folder was given"
SOURCES = 12
DOTS = 20
"""Maximum number of held-out losses drawn for a run."""
AXES: tuple[tuple[str, str, str, Ticks], ...] = (
    ("tokens", "tokens", "training tokens", "count"),
    ("flops", "compute", "model FLOPs", "power"),
)


def losses(inputs: Inputs) -> Section:
    """Return the loss against tokens and against FLOPs, on logarithmic axes."""
    title = "Loss against tokens and compute"
    if not inputs.runs:
        return Section("loss", title, absent=NO_RUNS)
    share = inputs.smoothing
    panels = tuple(
        _panel(f"against {label}", unit, ticks, [_curves(one, key, share) for one in inputs.runs])
        for key, label, unit, ticks in AXES
    )
    text = (
        "Training loss in nats per token (lines) and held-out loss of the mixture (dots: the mean "
        "over sources, weighted by their shares). "
        f"Smoothed lines are, at each point, means over the last {share:.0%} of the run so "
        "far. A cross is where a stage begins. Dotted is what a branch took over from its trunk; a "
        "square is a line of one point. "
        "FLOPs are those of the model, forward and backward, without recomputation."
    )
    return Section("loss", title, text, (Figure("loss", panels),))


def _panel(title: str, x_label: str, ticks: Ticks, of_runs: list[list[Series]]) -> Panel:
    series = tuple(one for some in of_runs for one in some)
    log = above_zero(series)
    return Panel(title, x_label, LOSS, series, x_log=True, y_log=log, x_ticks=ticks)


def _curves(one: Shown, key: str, share: float) -> list[Series]:
    series = _train(one, key, "loss", share)
    tokens, held_out = one.validation
    if len(tokens):
        rows = np.isin(one.metrics["tokens"], tokens)
        series.append(_dots(one, one.metrics[key][rows], held_out))
    return series


def _train(one: Shown, key: str, column: str, share: float) -> list[Series]:
    """Return a column of training losses as recorded and smoothed, thinned."""
    x, y = known(one.metrics[key], one.metrics[column])
    if not len(x):
        return []
    thin_x, recorded, smoothed = thin(x, y, smooth(y, share), log=True)
    return [
        *one.curve(thin_x, recorded, key, layer="recorded"),
        *one.curve(thin_x, smoothed, key, layer="smooth"),
        *_stages(one, key, column),
    ]


def _stages(one: Shown, key: str, column: str) -> list[Series]:
    x, y = stages_begin(one.run, key, column)
    name = f"{one.name}, a stage begins"
    return [one.series(x, y, name, style="cross", named=False)] if len(x) else []


def _dots(one: Shown, x: Column, y: Column) -> Series:
    kept_x, kept_y = thin(x, y, log=True, most=DOTS)
    return one.series(kept_x, kept_y, f"{one.name}, held out", style="dots", named=False)


def sources(inputs: Inputs) -> Section:
    """Return the training and held-out loss of each source, a panel each."""
    title = "Loss of each source"
    names = list(dict.fromkeys(n for one in inputs.runs for n in one.run.sources))
    if not names:
        why = "no run has a loss by source" if inputs.runs else NO_RUNS
        return Section("sources", title, absent=why)
    total = {
        name: sum(
            float(np.nanmax(one.metrics[f"tokens/{name}"]))
            for one in inputs.runs
            if f"tokens/{name}" in one.metrics and np.isfinite(one.metrics[f"tokens/{name}"]).any()
        )
        for name in names
    }
    kept = sorted(names, key=lambda name: -total[name])[:SOURCES]
    x_label, share = "training tokens of the mixture", inputs.smoothing
    left_out = ", ".join(name for name in names if name not in kept)
    panels = tuple(
        _panel(name, x_label, "count", [_source(one, name, share) for one in inputs.runs])
        for name in names
        if name in kept
    )
    note = f"Shown are the {SOURCES} sources with the most tokens; left out: {left_out}."
    notes = (note,) if left_out else ()
    text = "Training loss (lines) and held-out loss (dots) of each source, in nats per token."
    return Section("sources", title, text, (Figure("sources", panels),), notes=notes)


def _source(one: Shown, name: str, share: float) -> list[Series]:
    series = []
    if f"loss/{name}" in one.metrics:
        series += _train(one, "tokens", f"loss/{name}", share)
    if f"validation/{name}" in one.metrics:
        x, y = known(one.metrics["tokens"], one.metrics[f"validation/{name}"])
        series.append(_dots(one, x, y))
    return series


def forecasts(inputs: Inputs) -> Section:
    """Return the forecasts of each run's final loss over the course of the run."""
    title = "Forecast of the final loss"
    runs = [one for one in inputs.runs if "forecast/loss" in one.metrics]
    if not runs:
        why = "no run recorded a forecast" if inputs.runs else NO_RUNS
        return Section("forecast", title, absent=why)
    series: list[Series] = []
    for one in runs:
        rows = np.isfinite(one.metrics["forecast/loss"])
        x, y = thin(one.metrics["tokens"][rows], one.metrics["forecast/loss"][rows])
        least, most = (one.metrics.get(f"forecast/{end}") for end in ("low", "high"))
        if least is not None and most is not None:
            _, low, high = thin(one.metrics["tokens"][rows], least[rows], most[rows])
            both = np.isfinite(low) & np.isfinite(high)
            name, ends = f"{one.name}, 95 % interval", {"low": low[both], "high": high[both]}
            series.append(one.series(x[both], y[both], name, style="band", **ends))
        series.append(one.series(x, y))
        if one.state == "finished":
            end = one.metrics["tokens"][-1], smooth(one.metrics["loss"], inputs.smoothing)[-1]
            name = f"{one.name}, measured"
            series.append(star(name, *end, one.colour, run=one.number, named=False))
    when = "training tokens when it was forecast"
    panel = Panel("predicted final training loss", when, LOSS, tuple(series))
    text = (
        "The final training loss that the law of the schedule predicted from the run's own curve "
        "up to each point, with its 95 % interval; a star is what a finished run measured (its "
        "training loss, smoothed as above)."
    )
    return Section("forecast", title, text, (Figure("forecast", (panel,)),))
