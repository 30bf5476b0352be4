"""Figures of losses: over tokens and FLOPs, of each source, and what was forecast."""

from __future__ import annotations

import numpy as np

from allometry.launch.figures.figure import (
    Column,
    Figure,
    Panel,
    Series,
    Ticks,
    known,
    smooth,
    star,
    thin,
)
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section

LOSS = "loss (nats per token)"
SOURCES = 12
DOTS = 20
"""Held-out losses of a run, at most."""
AXES: tuple[tuple[str, str, str, Ticks], ...] = (
    ("tokens", "tokens", "training tokens", "count"),
    ("flops", "compute", "model FLOPs", "power"),
)


def losses(inputs: Inputs) -> Section:
    """Loss against tokens and against FLOPs, both axes logarithmic."""
    title = "Loss against tokens and compute"
    if not inputs.runs:
        return Section(key="loss", title=title, absent=_no_runs())
    share = inputs.smoothing
    panels = tuple(
        Panel(
            title=f"against {label}",
            x_label=unit,
            y_label=LOSS,
            x_log=True,
            y_log=True,
            x_ticks=ticks,
            series=tuple(s for one in inputs.runs for s in _curves(one, key, share)),
        )
        for key, label, unit, ticks in AXES
    )
    text = (
        "Training loss in nats per token (lines) and held-out loss of the mixture (dots: the mean "
        "over sources, weighted by their shares). "
        f"Smoothed lines are, at each point, means over the last {share:.0%} of the run so "
        "far. FLOPs are those of the model, forward and backward, without recomputation."
    )
    return Section(key="loss", title=title, text=text, figures=(Figure(key="loss", panels=panels),))


def _no_runs() -> str:
    return "no run folder was given"


def _curves(one: Shown, key: str, share: float) -> list[Series]:
    series = _train(one, key, "loss", share)
    tokens, held_out = one.validation
    if len(tokens):
        rows = np.isin(one.metrics["tokens"], tokens)
        series.append(_dots(one, one.metrics[key][rows], held_out))
    return series


def _train(one: Shown, key: str, column: str, share: float) -> list[Series]:
    """A column of training losses as recorded and smoothed, thinned."""
    x, y = known(one.metrics[key], one.metrics[column])
    if not len(x):
        return []
    thin_x, recorded, smoothed = thin(x, y, smooth(y, share), log=True)
    return [
        Series(
            name=one.name, x=thin_x, y=recorded, layer="recorded", colour=one.colour, run=one.number
        ),
        Series(
            name=one.name, x=thin_x, y=smoothed, layer="smooth", colour=one.colour, run=one.number
        ),
    ]


def _dots(one: Shown, x: Column, y: Column) -> Series:
    thin_x, thin_y = thin(x, y, log=True, most=DOTS)
    return Series(
        name=f"{one.name}, held out",
        x=thin_x,
        y=thin_y,
        style="dots",
        colour=one.colour,
        run=one.number,
        named=False,
    )


def sources(inputs: Inputs) -> Section:
    """Training and held-out loss of each source, a panel for each."""
    title = "Loss of each source"
    names = list(dict.fromkeys(n for one in inputs.runs for n in one.run.sources))
    if not names:
        why = "no run has a loss by source" if inputs.runs else _no_runs()
        return Section(key="sources", title=title, absent=why)
    total = {
        name: sum(
            float(np.nanmax(one.metrics[f"tokens/{name}"]))
            for one in inputs.runs
            if f"tokens/{name}" in one.metrics and np.isfinite(one.metrics[f"tokens/{name}"]).any()
        )
        for name in names
    }
    kept = sorted(names, key=lambda name: -total[name])[:SOURCES]
    left_out = [name for name in names if name not in kept]
    panels = tuple(
        Panel(
            title=name,
            x_label="training tokens of the mixture",
            y_label=LOSS,
            x_log=True,
            y_log=True,
            series=tuple(s for one in inputs.runs for s in _source(one, name, inputs.smoothing)),
        )
        for name in names
        if name in kept
    )
    notes: tuple[str, ...] = ()
    if left_out:
        notes = (
            f"Shown are the {SOURCES} sources with the most tokens; left out: "
            f"{', '.join(left_out)}.",
        )
    text = "Training loss (lines) and held-out loss (dots) of each source, in nats per token."
    return Section(
        key="sources",
        title=title,
        text=text,
        figures=(Figure(key="sources", panels=panels),),
        notes=notes,
    )


def _source(one: Shown, name: str, share: float) -> list[Series]:
    series = []
    if f"loss/{name}" in one.metrics:
        series += _train(one, "tokens", f"loss/{name}", share)
    if f"validation/{name}" in one.metrics:
        x, y = known(one.metrics["tokens"], one.metrics[f"validation/{name}"])
        series.append(_dots(one, x, y))
    return series


def forecasts(inputs: Inputs) -> Section:
    """What each run expected its final loss to be, as it went on."""
    title = "Forecast of the final loss"
    runs = [one for one in inputs.runs if "forecast/loss" in one.metrics]
    if not runs:
        why = "no run recorded a forecast" if inputs.runs else _no_runs()
        return Section(key="forecast", title=title, absent=why)
    series: list[Series] = []
    for one in runs:
        rows = np.isfinite(one.metrics["forecast/loss"])
        x, y = thin(one.metrics["tokens"][rows], one.metrics["forecast/loss"][rows])
        ends = [one.metrics.get(f"forecast/{end}") for end in ("low", "high")]
        if ends[0] is not None and ends[1] is not None:
            _, low, high = thin(one.metrics["tokens"][rows], ends[0][rows], ends[1][rows])
            both = np.isfinite(low) & np.isfinite(high)
            series.append(
                Series(
                    name=f"{one.name}, 95 % interval",
                    x=x[both],
                    y=y[both],
                    low=low[both],
                    high=high[both],
                    style="band",
                    colour=one.colour,
                    run=one.number,
                )
            )
        series.append(Series(name=one.name, x=x, y=y, colour=one.colour, run=one.number))
        if one.state == "finished":
            end = one.metrics["tokens"][-1], smooth(one.metrics["loss"], inputs.smoothing)[-1]
            name = f"{one.name}, measured"
            series.append(star(name, *end, one.colour, run=one.number, named=False))
    panel = Panel(
        title="predicted final training loss",
        x_label="training tokens when it was forecast",
        y_label=LOSS,
        series=tuple(series),
    )
    text = (
        "The final training loss that the law of the schedule predicted from the run's own curve "
        "up to each point, with its 95 % interval; a star is what a finished run measured (its "
        "training loss, smoothed as above)."
    )
    figure = Figure(key="forecast", panels=(panel,))
    return Section(key="forecast", title=title, text=text, figures=(figure,))
