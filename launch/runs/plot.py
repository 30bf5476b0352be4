"""``allometry plot``: loss against tokens and FLOPs, and a table of how runs began and ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from allometry.launch.command import Report
from allometry.launch.figures.drawing import check_format, draw
from allometry.launch.figures.figure import PALETTE, Figure, Panel, Series, colours, known, smooth
from allometry.launch.text import table
from allometry.laws.runs import Run, read_run


@dataclass(frozen=True)
class SourceSummary:
    """One corpus in one run: tokens read, training loss at start and end, held-out loss."""

    source: str
    tokens: int
    first_loss: float | None
    last_loss: float | None
    validation_loss: float | None


BLACK = "#000000"
SMOOTHED = 0.05
"""Smoothed losses are means over this share of the run so far."""


@dataclass(frozen=True)
class Summary:
    """How a run went. Losses are in nats per token; speeds are medians over rows."""

    folder: str
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    tokens_per_s: float
    mfu: float
    sources: list[SourceSummary]


def summarise(run: Run) -> Summary:
    """The numbers of a run's record that a person asks for first."""
    metrics = run.metrics
    return Summary(
        folder=str(run.folder),
        steps=int(metrics["step"][-1]),
        tokens=int(metrics["tokens"][-1]),
        first_loss=float(metrics["loss"][0]),
        last_loss=float(metrics["loss"][-1]),
        tokens_per_s=float(np.median(metrics["tokens_per_s"])),
        mfu=float(np.median(metrics["mfu"])),
        sources=[_source(run, name) for name in run.sources],
    )


def _source(run: Run, name: str) -> SourceSummary:
    def end(key: str, index: int) -> float | None:
        values = run.metrics.get(f"{key}/{name}")
        there = values[~np.isnan(values)] if values is not None else np.empty(0)
        return float(there[index]) if len(there) else None

    return SourceSummary(
        source=name,
        tokens=int(end("tokens", -1) or 0),
        first_loss=end("loss", 0),
        last_loss=end("loss", -1),
        validation_loss=end("validation", -1),
    )


def _table(summary: Summary) -> str:
    rows = [["source", "tokens", "loss at start", "at end", "held out"]]
    whole = SourceSummary("all", summary.tokens, summary.first_loss, summary.last_loss, None)
    for part in [*summary.sources, whole]:
        losses = (part.first_loss, part.last_loss, part.validation_loss)
        rows.append([part.source, f"{part.tokens:,}", *map(_loss, losses)])
    return (
        f"{table(rows, right=(1, 2, 3, 4), least=(20, 12, 16, 10, 10), gap='')}\n"
        f"{summary.steps:,} steps, {summary.tokens_per_s:,.0f} tokens/s, MFU {summary.mfu:.1%} "
        f"(medians), run folder {summary.folder}"
    )


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def draw_losses(folders: Sequence[Path], out: Path) -> Report:
    """Write the figure and summarise the runs. Raises UserError for a folder that holds no run."""
    runs = [read_run(folder) for folder in folders]
    check_format(out)
    draw(_figure(runs), out)
    summaries = [summarise(run) for run in runs]
    text = "\n\n".join([*map(_table, summaries), f"loss curves: {out}"])
    return Report({"figure": str(out), "runs": [asdict(summary) for summary in summaries]}, text)


def _figure(runs: Sequence[Run]) -> Figure:
    """Loss against tokens and against FLOPs, one legend for both."""
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    alone = len(runs) == 1
    panels = tuple(
        Panel(
            title=f"loss against {label}",
            x_label=label,
            y_label="loss (nats per token)",
            x_log=True,
            y_log=True,
            series=tuple(
                series
                for run, name, colour in zip(runs, names, colours(range(len(runs))), strict=True)
                for series in _curves(run, name, key, BLACK if alone else colour, alone=alone)
            ),
        )
        for key, label in (("tokens", "tokens"), ("flops", "FLOPs"))
    )
    return Figure(key="loss", panels=panels, size=(12.0, 4.5))


def _curves(run: Run, name: str, key: str, colour: str, *, alone: bool) -> list[Series]:
    """The run's loss (raw and smoothed); alone, each source's too; held-out losses as dots."""
    x, metrics = run.metrics[key], run.metrics
    smoothed = smooth(metrics["loss"], SMOOTHED)
    series = [
        Series(name=name, x=x, y=metrics["loss"], layer="recorded", colour=colour),
        Series(name=name, x=x, y=smoothed, layer="smooth", colour=colour),
    ]
    for source, own in zip(run.sources, cycle(PALETTE)):
        shade = own if alone else colour
        if alone:
            kept_x, losses = known(x, metrics[f"loss/{source}"])
            series.append(Series(name=source, x=kept_x, y=smooth(losses, SMOOTHED), colour=shade))
        if f"validation/{source}" in metrics:
            kept_x, losses = known(x, metrics[f"validation/{source}"])
            dots = f"{source}, held out"
            series.append(
                Series(name=dots, x=kept_x, y=losses, style="dots", colour=shade, named=alone)
            )
    return series
