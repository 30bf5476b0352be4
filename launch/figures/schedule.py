"""Figure of one step's schedule, by rank and document, from a run's plans.jsonl."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.figures.figure import Figure, Panel, Series, ordered
from allometry.launch.text import counted
from allometry.laws.runs import read_lines
from allometry.parallel.hdp.orders import Orders, schedule_orders
from allometry.parallel.hdp.replay import Replay, Span, replay
from allometry.scaling.hdp.plan import Plan
from allometry.trainer.record.plans import plan_of

_DUMMY_SHARE = 0.003
"""Share of the figure's width at which a dummy micro-batch is drawn, which takes no time."""
DUMMY, BLACK = "#999999", "#000000"

Lanes = Sequence[Sequence[Span]]
"""Spans of each rank in execution order, pipeline by pipeline."""


def recorded_schedule(folder: Path, step: int | None) -> tuple[Figure, dict[str, Any]]:
    """Return the figure and a summary of a step (None: the last recorded step)."""
    record = _record(folder, step)
    plan, pp = plan_of(record), int(record["pp"])

    def orders(micro_batches: int) -> Orders:  # actions of each rank of a pipeline, in order
        return schedule_orders(record["schedule"], pp, record["stages"] // pp, micro_batches)

    played = replay(plan, orders if pp > 1 else None)
    waves, dummies = max(map(len, plan.orders)), sum(order.count(None) for order in plan.orders)
    facts = {
        "step": record["step"],
        "mode": plan.mode,
        "ranks": plan.ranks,
        "waves": waves,
        "dummies": dummies,
        "balance": played.balance,  # makespan over the mean busy seconds of the ranks
        "makespan_s": played.makespan,
    }
    text = (
        f"step {record['step']}, {plan.mode}: {counted(plan.ranks, 'hdp rank')}"
        + (f" x {pp} pipeline ranks ({record['schedule']})" if pp > 1 else "")
        + f", {waves} waves, balance {played.balance:.3f}"
        + (f", {dummies} dummies" if dummies else "")
    )
    return schedule_figure(played, plan, text), facts


def _record(folder: Path, step: int | None) -> dict[str, Any]:
    """Return the requested row of plans.jsonl."""
    path = folder / "plans.jsonl"
    rows = {row["step"]: row for row in read_lines(path)}
    if not rows:
        raise UserError(
            f"{path} holds no plan; only runs with data.kind: documents plan their steps, from the "
            "first recorded one on"
        )
    step = max(rows) if step is None else step
    if step not in rows:
        nearest = min(rows, key=lambda known: (abs(known - step), known))
        raise UserError(
            f"{path} has no plan of step {step}, only of {len(rows)} steps from {min(rows)} to "
            f"{max(rows)}; the nearest is {nearest}"
        )
    return rows[step]


def schedule_figure(played: Replay, plan: Plan, title: str) -> Figure:
    """Return a figure with a row for each rank: its computations, coloured by ranks per unit."""
    lanes = [lane for pipeline in played.spans for lane in pipeline]
    pp = len(lanes) // plan.ranks
    panel = Panel(
        title=title,
        x_label="seconds, as planned (pale: forward; a line joins a ring)",
        y_label="hdp rank" if pp == 1 else "hdp rank, pipeline rank",
        series=(*_bars(lanes, plan, played.makespan or 1.0), *_rings(lanes)),
        rows=tuple(str(r) if pp == 1 else f"{r // pp}, {r % pp}" for r in range(len(lanes))),
    )
    return Figure("plan", (panel,), size=(12.0, min(14.0, 1.8 + 0.3 * len(lanes))))


def _bars(lanes: Lanes, plan: Plan, width: float) -> list[Series]:
    """Return bars, coloured by the number of ranks that share a unit, pale in the forward."""
    degrees = sorted({len(unit.ring) for unit in plan.units})
    shades: dict[int | None, str] = dict(zip(degrees, ordered(degrees), strict=True))
    groups: dict[tuple[int | None, bool], list[tuple[int, Span]]] = defaultdict(list)
    for row, span in _rows(lanes):
        degree = None if span.unit is None else len(plan.units[span.unit].ring)
        groups[degree, span.action.kind == "F"].append((row, span))
    series = []
    for degree, forward in sorted(groups, key=lambda group: (group[0] or math.inf, group[1])):
        spans = groups[degree, forward]
        least = _DUMMY_SHARE * width if degree is None else 0.0
        low = np.array([span.start for _, span in spans])
        series.append(
            Series(
                "counts nothing" if degree is None else counted(degree, "rank"),
                low,
                np.array([float(row) for row, _ in spans]),
                low=low,
                high=np.array([max(span.end, span.start + least) for _, span in spans]),
                style="bars",
                colour=shades.get(degree, DUMMY),
                pale=forward,
                named=not forward or (degree, False) not in groups,
            )
        )
    return series


def _rings(lanes: Lanes) -> list[Series]:
    """Return a line through a forward that the ranks of a ring share, with a dot on each rank."""
    rings = defaultdict(list)
    for row, span in _rows(lanes):
        if span.unit is not None and span.action.kind == "F":
            # Offset inside the bar, so that lines of rings with the same start do not overlap.
            at = span.start + (0.1 + 0.1 * (span.unit % 8)) * (span.end - span.start)
            rings[span.unit, span.action.stage, at].append(row)
    joined = [(at, rows) for (*_, at), rows in rings.items() if len(rows) > 1]
    if not joined:
        return []
    low = np.array([min(rows) for _, rows in joined], np.float64)
    high = np.array([max(rows) for _, rows in joined], np.float64)
    lines, dots = np.array([at for at, _ in joined]), [(at, r) for at, rows in joined for r in rows]
    x, y = np.array(dots, np.float64).T
    return [
        Series("ring", lines, low, "links", BLACK, low=low, high=high, named=False),
        Series("ring", x, y, "dots", BLACK, named=False),
    ]


def _rows(lanes: Lanes) -> Iterator[tuple[int, Span]]:
    return ((row, span) for row, lane in enumerate(lanes) for span in lane)
