"""Strong and weak scaling as a table and a figure: ``allometry plan --scale``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from allometry.launch.figures.drawing import draw
from allometry.launch.figures.figure import PALETTE, Figure, Panel, Series
from allometry.launch.studies.plan_text import words
from allometry.launch.text import size, table
from allometry.scaling.search.curves import Point


def scale_text(points: Sequence[Point]) -> str:
    """Return the curves as a table, with a line for each number of GPUs."""
    header = ["scaling", "GPUs", "sequences", "layout", "recompute", "micro", "s/step"]
    rows = [[*header, "tok/s", "tok/s/GPU", "efficiency", "MFU", "memory", "days"]]
    for point in points:
        row = [point.kind, f"{point.gpus:,}", f"{point.sequences:,}" if point.sequences else ""]
        if point.best is None:
            rows.append([*row, point.reason, *[""] * 9])
            continue
        one, choice = point.best, point.best.choice
        rows.append(
            [
                *(*row, words(choice, point.gpus), choice.checkpointing, str(choice.micro_batch)),
                *(f"{one.seconds:.4g}", f"{one.tokens_per_second * point.gpus:,.0f}"),
                *(f"{one.tokens_per_second:,.0f}", f"{point.efficiency:.1%}", f"{one.mfu:.1%}"),
                *(size(one.memory.total), f"{one.days:.3g}"),
            ]
        )
    return table(rows, right=(1, 2, *range(5, 13)))


def scale_figure(points: Sequence[Point], title: str, out: Path) -> None:
    """Draw the tokens per second of all GPUs with intervals, and the efficiency."""
    rates, shares = [], []
    for kind, colour in (("strong", PALETTE[0]), ("weak", PALETTE[1])):
        mine = [p for p in points if p.kind == kind and p.best is not None]
        if not mine:
            continue
        gpus = np.array([p.gpus for p in mine], dtype=float)
        each = np.array([[p.best.seconds, p.best.low, p.best.high] for p in mine if p.best])
        rate = np.array([p.best.tokens_per_second for p in mine if p.best]) * gpus
        low, high = (rate * each[:, 0] / each[:, end] for end in (2, 1))
        band = Series(f"{kind}, 90 %", gpus, rate, "band", colour, low=low, high=high, named=False)
        rates += [Series(kind, gpus, rate, "line", colour), band]
        efficiency = np.array([p.efficiency for p in mine], dtype=float)
        shares.append(Series(kind, gpus, efficiency, "line", colour))
    whole, each = "tokens/s of all GPUs", "rate of a GPU over that of the first"
    panels = (
        Panel(title, "GPUs", whole, tuple(rates), x_log=True, y_log=True),
        Panel("efficiency", "GPUs", each, tuple(shares), x_log=True),
    )
    draw(Figure("scaling", panels, legend=True), out)
