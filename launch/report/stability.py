"""Figures of monitored quantities, with alarms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from allometry.launch.figures.figure import Column, Figure, Panel, Series, above_zero, known, thin
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section


@dataclass(frozen=True, slots=True)
class Watched:
    """A panel of the columns that equal ``key`` or begin with ``key/``, reduced to one curve.

    ``reduce``: reduction over these columns. ``alarm``: kind of alarm that is marked in the panel.
    """

    key: str
    title: str
    unit: str
    reduce: Callable[..., Any] = np.fmax.reduce
    log: bool = True
    alarm: str | None = None


WATCHED = (
    Watched("grad_norm", "norm of the gradient", "norm before clipping"),
    Watched("monitors/clip_rate", "clipped steps", "share of steps", log=False),
    Watched(
        "monitors/grad_rms",
        "gradient of the role with the least",
        "rms after clipping",
        np.fmin.reduce,
        alarm="gradient_near_eps",
    ),
    Watched("monitors/update_ratio", "largest update of a role", "rms of change / rms of weights"),
    Watched(
        "monitors/attention_logit_max",
        "largest attention logit",
        "logit",
        log=False,
        alarm="attention_logit",
    ),
    Watched("monitors/attention_z", "attention z, largest layer", "mean of (log Σ exp)²"),
    Watched("monitors/output/log_z", "log Z of the output", "mean of log Z", log=False),
    Watched(
        "monitors/activation_max",
        "largest activation",
        "magnitude of a block's output",
        alarm="massive_activation",
    ),
    Watched("monitors/branch_rms", "largest branch of a layer", "rms added to the residual"),
    Watched(
        "monitors/outlier_percent", "outliers, worst branch", "% beyond 5 deviations", log=False
    ),
    Watched("monitors/singular", "largest singular value of a matrix", "singular value", log=False),
    Watched(
        "monitors/sphere_drift", "drift off the sphere", "largest ‖W‖/R − 1", alarm="off_sphere"
    ),
    Watched("router/max_vio", "load of experts", "largest excess over the mean", log=False),
    Watched("router/entropy", "entropy of the router", "nats", log=False),
)


def stability(inputs: Inputs) -> Section:
    """Return a panel for each quantity that a run has, with marks at its alarms."""
    title = "Stability"
    if not inputs.runs:
        return Section("stability", title, absent="no run folder was given")
    panels = tuple(panel for watched in WATCHED if (panel := _panel(inputs, watched)))
    if not panels:
        return Section("stability", title, absent="no run has a norm or a monitor")
    notes = []
    if not any(key.startswith("monitors/") for one in inputs.runs for key in one.metrics):
        notes.append("No run recorded monitors (record.monitors.every_steps): the norm alone.")
    alarms = sum(event.get("event") == "alarm" for one in inputs.runs for event in one.run.events)
    notes.append(f"Alarms raised: {alarms or 'none'}.")
    text = (
        "What monitors saw as the runs went on; of quantities with a value for each layer, role or "
        "matrix, the extreme one. A cross marks the step at which an alarm was raised."
    )
    return Section("stability", title, text, (Figure("stability", panels),), notes=tuple(notes))


def _panel(inputs: Inputs, watched: Watched) -> Panel | None:
    series: list[Series] = []
    for one in inputs.runs:
        x, y = _column(one, watched)
        if not len(x):
            continue
        series += one.curve(*thin(x, y), "step")  # type: ignore[call-arg]
        series += _alarms(one, watched, x, y)
    if not series:
        return None
    log = watched.log and above_zero(series)
    return Panel(watched.title, "step", watched.unit, tuple(series), y_log=log)


def _column(one: Shown, watched: Watched) -> tuple[Column, Column]:
    """Return steps and values: of the column ``key`` if it exists, else the reduced columns."""
    metrics = one.metrics
    if watched.key in metrics:
        return known(metrics["step"], metrics[watched.key])
    parts = [values for key, values in metrics.items() if key.startswith(watched.key + "/")]
    if not parts:
        return np.empty(0), np.empty(0)
    return known(metrics["step"], watched.reduce(np.stack(parts)))


def _alarms(one: Shown, watched: Watched, x: Column, y: Column) -> list[Series]:
    alarms = [
        event["step"]
        for event in one.run.events
        if watched.alarm is not None
        and (event.get("event"), event.get("alarm")) == ("alarm", watched.alarm)
        and isinstance(event.get("step"), int)
    ]
    if not alarms:
        return []
    steps = np.array(alarms, np.float64)
    rows = np.clip(np.searchsorted(x, steps), 0, len(x) - 1)
    name, notes = f"{one.name}, alarm", (str(watched.alarm),) * len(alarms)
    more: dict[str, Any] = {"run": one.number, "notes": notes, "named": False}
    return [Series(name, steps, y[rows], "cross", "#C00000", **more)]
