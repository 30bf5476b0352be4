"""``allometry plot``: loss against tokens and FLOPs, and a table of how runs began and ended."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from errno import EACCES, EISDIR
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.launch.report.figure import smooth
from allometry.laws.runs import Run, read_run

Column = NDArray[np.float64]


@dataclass(frozen=True)
class SourceSummary:
    """One corpus in one run: tokens read, training loss at start and end, held-out loss."""

    source: str
    tokens: int
    first_loss: float | None
    last_loss: float | None
    validation_loss: float | None


FORMATS = (".png", ".svg", ".pdf")
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
        known = values[~np.isnan(values)] if values is not None else np.empty(0)
        return float(known[index]) if len(known) else None

    return SourceSummary(
        source=name,
        tokens=int(end("tokens", -1) or 0),
        first_loss=end("loss", 0),
        last_loss=end("loss", -1),
        validation_loss=end("validation", -1),
    )


def table(summary: Summary) -> str:
    """A run's summary as a short table."""
    lines = [f"{'source':<20}{'tokens':>12}{'loss at start':>16}{'at end':>10}{'held out':>10}"]
    total = SourceSummary("all", summary.tokens, summary.first_loss, summary.last_loss, None)
    for part in [*summary.sources, total]:
        lines.append(
            f"{part.source:<20}{part.tokens:>12,}{_loss(part.first_loss):>16}"
            f"{_loss(part.last_loss):>10}{_loss(part.validation_loss):>10}"
        )
    lines.append(
        f"{summary.steps:,} steps, {summary.tokens_per_s:,.0f} tokens/s, MFU {summary.mfu:.1%} "
        f"(medians), run folder {summary.folder}"
    )
    return "\n".join(lines)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def draw(folders: Sequence[Path], out: Path, *, as_json: bool) -> str:
    """Write the figure and return the runs' tables as text, or the summaries as JSON.

    Raises UserError for a folder that holds no run.
    """
    runs = [read_run(folder) for folder in folders]
    check_format(out)
    _figure(runs, out)
    summaries = [summarise(run) for run in runs]
    if as_json:
        return json.dumps({"figure": str(out), "runs": [asdict(s) for s in summaries]}, indent=2)
    return "\n\n".join([*map(table, summaries), f"loss curves: {out}"])


def check_format(out: Path) -> None:
    """Make the folder of ``out``. Raises UserError: it cannot be, or no figure is named so."""
    if out.suffix not in FORMATS:
        raise UserError(f"--out={out}: a figure is written as {', '.join(FORMATS)}; name one so")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            raise IsADirectoryError(EISDIR, "it is a folder")
        if not os.access(out.parent, os.W_OK):
            raise PermissionError(EACCES, "its folder may not be written to")
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be written: {error.strerror}; choose another path"
        ) from None


def _figure(runs: Sequence[Run], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout="constrained")
    for panel, key, axis in zip(panels, ("tokens", "flops"), ("tokens", "FLOPs"), strict=True):
        for index, (run, label) in enumerate(zip(runs, _labels(runs), strict=True)):
            _draw_run(panel, run, label, key, f"C{index}", alone=len(runs) == 1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3, which="both")
        # A few numbers wherever the curve lies: a log axis alone would name 1 and 10 only.
        panel.yaxis.set_major_locator(MaxNLocator(8))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter("{x:.3g}")
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Folder names, or whole paths where two runs share a name."""
    names = [run.folder.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _draw_run(panel: Any, run: Run, label: str, key: str, colour: str, *, alone: bool) -> None:
    """The run's loss (raw and smoothed); alone, each source's too; held-out losses as dots."""
    x, metrics = run.metrics[key], run.metrics
    main = "black" if alone else colour
    panel.plot(x, metrics["loss"], color=main, lw=0.6, alpha=0.35)
    panel.plot(x, smooth(metrics["loss"], SMOOTHED), color=main, lw=1.6, label=label)
    for index, name in enumerate(run.sources):
        shade = f"C{index}" if alone else colour
        if alone:
            known = ~np.isnan(metrics[f"loss/{name}"])
            own = smooth(metrics[f"loss/{name}"][known], SMOOTHED)
            panel.plot(x[known], own, color=shade, lw=1.0, label=name)
        held_out = metrics.get(f"validation/{name}")
        if held_out is not None:
            known = ~np.isnan(held_out)
            dots = f"{name}, held out" if alone else None
            panel.plot(x[known], held_out[known], "o", color=shade, ms=5, label=dots)
