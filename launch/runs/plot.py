"""``allometry plot``: loss against tokens and FLOPs, and a table of how runs began and ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.figure import PALETTE, Figure, Panel, Series, colours, known, smooth
from allometry.launch.runs.commands import Plot
from allometry.launch.text import names_of, table
from allometry.laws.runs import Run, read_run

BLACK = "#000000"
SMOOTHED = 0.05
"""Smoothed losses are means over this share of the run so far."""


def plotted(asked: Plot) -> Report:
    """Draw the losses of runs, or one step's schedule; UserError for a folder that holds none."""
    if asked.hdp:
        from allometry.launch.runs.gantt import draw_plan, run_and_step

        return draw_plan(*run_and_step(asked.runs), asked.out or Path("plan.png"))
    out = asked.out or Path("loss.png")
    check_format(out)
    runs, left_out = _runs(asked.runs)
    draw(_figure(runs), out)
    summaries = [_summary(run) for run in runs]
    text = "\n\n".join([*map(_table, summaries), *left_out, f"loss curves: {out}"])
    return Report({"figure": str(out), "runs": summaries, "left_out": left_out}, text)


def _runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs among several paths, as ``runs/*`` gives them, and why others are left out."""
    runs, left_out = list[Run](), list[str]()
    for path in paths:
        try:
            runs.append(read_run(path))
        except UserError as error:
            if len(paths) == 1 or not path.exists() or (path / "metrics.jsonl").exists():
                raise  # what is missing or damaged
            left_out.append(f"left out: {error}")
    if not runs:
        raise UserError(f"none of the {len(paths)} that are named is a run; {left_out[0]}")
    return runs, left_out


def _summary(run: Run) -> dict[str, Any]:
    """How a run went. Losses are in nats per token; speeds are medians over rows."""
    metrics = run.metrics
    return {
        "folder": str(run.folder),
        "steps": int(metrics["step"][-1]),
        "tokens": int(metrics["tokens"][-1]),
        "first_loss": float(metrics["loss"][0]),
        "last_loss": float(metrics["loss"][-1]),
        "tokens_per_s": float(np.median(metrics["tokens_per_s"])),
        "mfu": float(np.median(metrics["mfu"])),
        "sources": [_of_source(run, name) for name in run.sources],
    }


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
    return (
        f"{table(rows, right=(1, 2, 3, 4), least=(20, 12, 16, 10, 10), gap='')}\n"
        f"{summary['steps']:,} steps, {summary['tokens_per_s']:,.0f} tokens/s, "
        f"MFU {summary['mfu']:.1%} (medians), run folder {summary['folder']}"
    )


def _figure(runs: Sequence[Run]) -> Figure:
    """Loss against tokens and against FLOPs, one legend for both."""
    names = names_of([run.folder for run in runs])
    alone = len(runs) == 1
    panels = tuple(
        Panel(
            f"loss against {label}",
            label,
            "loss (nats per token)",
            tuple(
                series
                for run, name, colour in zip(runs, names, colours(range(len(runs))), strict=True)
                for series in _curves(run, name, key, BLACK if alone else colour, alone=alone)
            ),
            x_log=True,
            y_log=True,
        )
        for key, label in (("tokens", "tokens"), ("flops", "FLOPs"))
    )
    return Figure("loss", panels)


def _curves(run: Run, name: str, key: str, colour: str, *, alone: bool) -> list[Series]:
    """The run's loss (raw and smoothed); alone, each source's too; held-out losses as dots."""
    x, metrics = run.metrics[key], run.metrics
    smoothed = smooth(metrics["loss"], SMOOTHED)
    series = [
        Series(name, x, metrics["loss"], layer="recorded", colour=colour),
        Series(name, x, smoothed, layer="smooth", colour=colour),
    ]
    for source, own in zip(run.sources, cycle(PALETTE)):
        shade = own if alone else colour
        if alone:
            kept_x, losses = known(x, metrics[f"loss/{source}"])
            series.append(Series(source, kept_x, smooth(losses, SMOOTHED), colour=shade))
        if f"validation/{source}" in metrics:
            kept_x, losses = known(x, metrics[f"validation/{source}"])
            dots = f"{source}, held out"
            series.append(Series(dots, kept_x, losses, "dots", shade, named=alone))
    return series
