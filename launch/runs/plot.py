"""Loss against tokens and FLOPs, and tables of runs' results: ``allometry plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.branches import branched, stages_begin, taken_over, trunks_first
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.figure import (
    PALETTE,
    Figure,
    Panel,
    Series,
    Ticks,
    above_zero,
    colours,
    known,
    smooth,
)
from allometry.launch.runs.commands import Plot
from allometry.launch.text import counted, finite, names_of, table
from allometry.laws.runs import Run, read_run

BLACK = "#000000"
OF_SOURCES = tuple(colour for colour in PALETTE if colour != BLACK)
LOSS = "loss (nats per token)"
AXES: tuple[tuple[str, str, Ticks], ...] = (
    ("tokens", "tokens", "count"),
    ("flops", "FLOPs", "power"),
)
SMOOTHED = 0.05
"""Share of the run so far over which smoothed losses are averaged."""


def plotted(asked: Plot) -> Report:
    """Draw the losses of runs, or one step's schedule.

    Raises UserError: a folder has no run, or the number of labels differs from the number of runs.
    """
    if asked.hdp:
        if asked.labels:
            raise UserError("--label names curves, and --hdp draws none; leave one of them out")
        from allometry.launch.runs.gantt import draw_plan, run_and_step

        return draw_plan(*run_and_step(asked.runs), asked.out or Path("plan.png"))
    out = asked.out or Path("loss.png")
    check_format(out)
    named, left_out = _runs(dict(zip(_names(asked), asked.runs, strict=True)))
    draw(_figure(list(named.values()), list(named)), out)
    summaries = [_summary(run, name) for name, run in named.items()]
    parts = [*map(_table, summaries), "\n".join(left_out), f"loss curves: {out}"]
    text = "\n\n".join(filter(None, parts))
    return Report({"figure": str(out), "runs": summaries, "left_out": left_out}, text)


def _runs(named: dict[str, Path]) -> tuple[dict[str, Run], list[str]]:
    """Return the runs among paths such as ``runs/*``, and reasons for leaving out others."""
    runs, left_out = dict[str, Run](), list[str]()
    for name, path in named.items():
        try:
            runs[name] = read_run(path)
        except UserError as error:
            if len(named) == 1 or not path.exists() or (path / "metrics.jsonl").exists():
                raise  # a missing or damaged run
            left_out.append(f"left out: {error}")
    if not runs:
        raise UserError(f"none of the {len(named)} that are named is a run; {left_out[0]}")
    return runs, left_out


def _names(asked: Plot) -> list[str]:
    """Return the displayed name of each run."""
    if not asked.labels:
        return names_of(asked.runs)
    if len(asked.labels) != len(asked.runs):
        raise UserError(
            f"--label is given {counted(len(asked.labels), 'time')} for "
            f"{counted(len(asked.runs), 'run')}; give it once for each run, in their order"
        )
    if len(set(asked.labels)) < len(asked.labels):
        twice = next(label for label in asked.labels if asked.labels.count(label) > 1)
        raise UserError(f"--label {twice!r} is given to two runs; give each its own")
    return list(asked.labels)


def _summary(run: Run, name: str) -> dict[str, Any]:
    """Return a summary of a run. Losses are in nats per token; speeds are medians over rows."""
    metrics = run.metrics
    return {
        "label": name,
        "folder": str(run.folder),
        "steps": int(metrics["step"][-1]),
        "tokens": int(metrics["tokens"][-1]),
        "first_loss": finite(metrics["loss"][0]),
        "last_loss": finite(metrics["loss"][-1]),
        "tokens_per_s": _median(run, "tokens_per_s"),
        "mfu": _median(run, "mfu"),
        "sources": [_of_source(run, name) for name in run.sources],
    }


def _median(run: Run, column: str) -> float | None:
    values = run.metrics.get(column, np.empty(0))
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _of_source(run: Run, name: str) -> dict[str, Any]:
    def end(key: str, index: int) -> float | None:
        values = run.metrics.get(f"{key}/{name}")
        there = values[~np.isnan(values)] if values is not None else np.empty(0)
        return float(there[index]) if len(there) else None

    return {
        "source": name,
        "tokens": int(end("tokens", -1) or 0),
        "first_loss": end("loss", 0),
        "last_loss": end("loss", -1),
        "validation_loss": end("validation", -1),
    }


def _table(summary: Mapping[str, Any]) -> str:
    rows = [["source", "tokens", "loss at start", "at end", "held out"]]
    for part in [*summary["sources"], {**summary, "source": "all"}]:
        losses = (part.get(f"{kind}_loss") for kind in ("first", "last", "validation"))
        said = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
        rows.append([part["source"], f"{part['tokens']:,}", *said])
    speed, mfu = summary["tokens_per_s"], summary["mfu"]
    went = [counted(summary["steps"], "step")]
    went += [] if speed is None else [f"{speed:,.0f} tokens/s"]
    went += [] if mfu is None else [f"MFU {mfu:.1%} (medians)"]
    return (
        f"{summary['label']}\n"
        f"{table(rows, right=(1, 2, 3, 4), least=(20, 12, 16, 10, 10), gap='')}\n"
        f"{', '.join(went)}, run folder {summary['folder']}"
    )


def _figure(runs: Sequence[Run], names: Sequence[str]) -> Figure:
    """Return loss against tokens and FLOPs, with one legend; trunks are below their branches."""
    alone = len(runs) == 1
    shades = [BLACK] if alone else colours(range(len(runs)))
    panels = []
    for key, label, ticks in AXES:
        series = tuple(
            one
            for place in trunks_first(runs)
            for one in _curves(runs[place], names[place], key, shades[place], alone=alone)
        )
        title, log = f"loss against {label}", above_zero(series)
        panels.append(Panel(title, label, LOSS, series, x_log=True, y_log=log, x_ticks=ticks))
    return Figure("loss", tuple(panels))


def _curves(run: Run, name: str, key: str, colour: str, *, alone: bool) -> list[Series]:
    """Return the run's loss (raw and smoothed) and held-out losses; alone, also each source's."""
    x, metrics = run.metrics[key], run.metrics
    kept_x, losses = known(x, metrics["loss"])
    fork = taken_over(run, key)
    raw = Series(name, kept_x, losses, layer="recorded", colour=colour)
    line = Series(name, kept_x, smooth(losses, SMOOTHED), layer="smooth", colour=colour)
    series = [*branched(raw, fork), *branched(line, fork)]
    begins = stages_begin(run, key)
    if len(begins[0]):
        series.append(Series(f"{name}, a stage begins", *begins, "cross", colour, named=False))
    for source, own in zip(run.sources, cycle(OF_SOURCES)):
        shade = own if alone else colour
        if alone:
            kept_x, losses = known(x, metrics[f"loss/{source}"])
            series.append(Series(source, kept_x, smooth(losses, SMOOTHED), colour=shade))
        if f"validation/{source}" in metrics:
            kept_x, losses = known(x, metrics[f"validation/{source}"])
            dots = f"{source}, held out"
            series.append(Series(dots, kept_x, losses, "dots", shade, named=alone))
    return series
