"""Tables of runs, launches and events; figures of speed and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from allometry.configs.format import human
from allometry.launch.figures.figure import Figure, Panel, Series, known, thin
from allometry.launch.report.inputs import Inputs, Shown
from allometry.launch.report.section import Section, Table

RUN_HEAD = (
    "run", "state", "N", "all", "active", "tokens D", "D/N", "FLOPs C", "final loss", "measured on",
    "train loss",
)  # fmt: skip
FEW_SETTINGS = 2
"""Maximum number of columns of settings that are shown next to the results."""
SETTINGS_HEAD = ("run", "lr", "schedule", "seed", "layout", "versions", "commit")
LAUNCH_HEAD = (
    "run", "launch", "from step", "to step", "layout", "tokens/s", "MFU", "peak memory", "commit",
)  # fmt: skip
EVENT_HEAD = ("run", "time (UTC)", "step", "event", "details")
QUIET = ("checkpoint_saved", "started", "finished", "repetition")
EVENTS = 300
AXES = ("hdp", "tp", "pp", "ep")
GIB = 2.0**30


def runs(inputs: Inputs) -> Section:
    """Return tables of the runs with their states and results."""
    title = "Runs"
    if not inputs.runs:
        why = "no run has a row yet" if inputs.notes else "no run folder was given"
        return Section("runs", title, absent=why, notes=inputs.notes)
    text = (
        "N: parameters without embedding and head; beside it all of them, and those that a token "
        "uses. D: training tokens. C: model FLOPs. The final "
        "loss, in nats per token, is the held-out loss of the mixture if it was measured after the "
        "last step, else the mean training loss of the last tenth of the recorded steps."
    )
    results = _by_run(RUN_HEAD, [(one.number, _run_row(one)) for one in inputs.runs])
    settings = _by_run(SETTINGS_HEAD, [(one.number, _settings_row(one)) for one in inputs.runs])
    settings = settings.without_equal_columns()
    few = len(settings.head) <= 1 + FEW_SETTINGS
    tables = (results.beside(settings),) if few else (results, settings)
    return Section("runs", title, text, tables=tables, notes=inputs.notes)


def _run_row(one: Shown) -> tuple[str, ...]:
    metrics = one.metrics
    n = one.parameters.get("non_embedding")
    tokens = float(metrics["tokens"][-1])
    loss, measured = one.final_loss
    return (
        one.name,
        one.state,
        _si(n),
        _si(one.parameters.get("total")),
        _si(one.parameters.get("active")),
        _si(tokens),
        f"{tokens / n:.3g}" if n else "–",
        f"{metrics['flops'][-1]:.3e}",
        f"{loss:.4f}",
        measured,
        f"{one.train_loss:.4f}",
    )


def _settings_row(one: Shown) -> tuple[str, ...]:
    config, record = one.run.config, one.run.record
    versions = record.get("versions", {})
    return (
        one.name,
        str(config.get("optimizer", {}).get("lr", "–")),
        str(config.get("schedule", {}).get("kind", "–")),
        str(config.get("run", {}).get("seed", "–")),
        layout(record.get("layout")),
        " ".join(f"{k} {versions[k]}" for k in ("allometry", "torch") if k in versions) or "–",
        str(record.get("commit") or "–"),
    )


def _si(value: float | None) -> str:
    """Return a count with a suffix: 1.57M."""
    return "–" if value is None or not math.isfinite(value) else human(value)


def layout(value: Mapping[str, Any] | None) -> str:
    """Return the degrees above 1, such as ``hdp 2, ZeRO 1``; ``1 rank`` if all are 1."""
    if not value:
        return "–"
    parts = [f"{axis} {value[axis]}" for axis in AXES if value.get(axis, 1) != 1]
    if value.get("zero_stage"):
        parts.append(f"ZeRO {value['zero_stage']}")
    return ", ".join(parts) or "1 rank"


def throughput(inputs: Inputs) -> Section:
    """Return speed and memory over each run, and by launch."""
    title = "Layouts and throughput"
    if not inputs.runs:
        return Section("throughput", title, absent="no run folder was given")
    panels = []
    for key, name, unit, scale in (
        ("tokens_per_s", "speed", "tokens/s", 1.0),
        ("mfu", "model FLOPs utilization", "% of the peak of all ranks", 100.0),
        ("peak_bytes", "peak memory", "GiB on the fullest rank", 1 / GIB),
    ):
        series = [s for one in inputs.runs for s in _speed(one, key, scale)]
        if series:
            panels.append(Panel(name, "step", unit, tuple(series)))
    rows = [(one.number, row) for one in inputs.runs for row in _launches(one)]
    caption = "Each launch of each run; speeds are medians over its recorded steps."
    table = _by_run(LAUNCH_HEAD, rows, caption)
    text = (
        "Tokens per second, the share of the hardware's peak that the model's FLOPs use (MFU), and "
        "the most memory that was in use, at each recorded step."
    )
    figures = (Figure("throughput", tuple(panels)),) if panels else ()
    return Section("throughput", title, text, figures, (table,))


def _by_run(
    head: tuple[str, ...], rows: Sequence[tuple[int, tuple[str, ...]]], caption: str = ""
) -> Table:
    """Return a table of rows with the numbers of their runs."""
    return Table(head, tuple(row for _, row in rows), caption, tuple(number for number, _ in rows))


def _speed(one: Shown, key: str, scale: float) -> list[Series]:
    if key not in one.metrics:
        return []
    x, y = thin(*known(one.metrics["step"], one.metrics[key] * scale))
    return one.curve(x, y, "step") if len(x) else []


def _launches(one: Shown) -> list[tuple[str, ...]]:
    launches = one.run.record.get("launches") or [{"first_step": 1, "layout": None}]
    steps = one.metrics["step"]
    firsts = [int(launch.get("first_step", 1)) for launch in launches]
    ends = [*(first - 1 for first in firsts[1:]), int(steps[-1])]
    rows: list[tuple[str, ...]] = []
    for number, (launch, first, last) in enumerate(zip(launches, firsts, ends, strict=True), 1):
        within = (steps >= first) & (steps <= last)

        def middle(key: str, within: Any = within) -> float:
            values = one.metrics.get(key, np.empty(0))
            values = values[within] if len(values) else values
            return float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan

        peak, most = one.metrics.get("peak_bytes"), math.nan
        if peak is not None and within.any():
            most = float(np.nanmax(peak[within])) / GIB
        cells = (
            str(number),
            str(first),
            str(last) if within.any() else "no step recorded",
            layout(launch.get("layout") or one.run.record.get("layout")),
            _number(middle("tokens_per_s"), ",.0f"),
            _number(middle("mfu"), ".1%"),
            _number(most, ".2f", " GiB"),
            str(launch.get("commit") or "–"),
        )
        rows.append((one.name, *cells))
    return rows


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "–"


def events(inputs: Inputs) -> Section:
    """Return all events except saved checkpoints, regular starts and ends, and repetitions."""
    title = "Restarts and events"
    if not inputs.runs:
        return Section("events", title, absent="no run folder was given")
    shown = [
        (one.number, _event_row(one, event))
        for one in inputs.runs
        for event in one.run.events
        if event.get("event") not in QUIET
    ]
    if not shown:
        return Section("events", title, absent="no run was stopped, resumed or alarmed")
    note = f"The first {EVENTS} of {len(shown)} events are shown; events.jsonl has all."
    notes = (note,) if len(shown) > EVENTS else ()
    table = _by_run(EVENT_HEAD, shown[:EVENTS])
    text = (
        "Everything in events.jsonl but saved checkpoints, regular starts and ends, and what is "
        "read again."
    )
    return Section("events", title, text, tables=(table,), notes=notes)


def _event_row(one: Shown, event: Mapping[str, Any]) -> tuple[str, ...]:
    when, said = event.get("time"), "–"
    if isinstance(when, int | float):
        said = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(when))
    rest = {k: v for k, v in event.items() if k not in ("event", "time", "step")}
    details = ", ".join(f"{key} {value}" for key, value in rest.items())
    kind = str(event.get("event", "?")).replace("_", " ")
    return (one.name, said, str(event.get("step", "–")), kind, details)
