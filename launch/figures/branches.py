"""Runs that branch from other runs: drawing order, and a dotted line up to the branch point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from allometry.launch.figures.figure import Column, Series, known
from allometry.laws.runs import Run


def trunks_first(runs: Sequence[Run]) -> list[int]:
    """Return the indices of the runs in an order in which each run follows its parent.

    Later curves are drawn on top, so a trunk is drawn below its branches. The order is otherwise
    unchanged.
    """
    order: list[int] = []

    def add(place: int, below: tuple[int, ...] = ()) -> None:
        parent = _parent(runs, place)
        if parent is not None and parent not in (*below, place):
            add(parent, (*below, place))
        if place not in order:
            order.append(place)

    for place in range(len(runs)):
        add(place)
    return order


def _parent(runs: Sequence[Run], place: int) -> int | None:
    """Return the index of the parent run, found by its path or by its name in the same folder."""
    branch, parent = runs[place], runs[place].record.get("parent")
    if not isinstance(parent, dict) or not isinstance(parent.get("folder"), str):
        return None
    named = Path(parent["folder"])
    beside = branch.folder.resolve().parent / named.name
    places = {run.folder.resolve(): number for number, run in enumerate(runs)}
    return places.get(named.resolve(), places.get(beside))


def taken_over(run: Run, along: str) -> float:
    """Return the metric ``along`` at the branch point, NaN for a run without a parent."""
    parent = run.record.get("parent")
    step = parent.get("step") if isinstance(parent, dict) else None
    if not isinstance(step, int):
        return math.nan
    before = run.metrics[along][run.metrics["step"] <= step]
    return float(before[-1]) if len(before) else math.nan


def branched(series: Series, fork: float) -> list[Series]:
    """Split a curve at the branch point ``fork`` (NaN: no split) into a dotted and a solid part."""
    taken = series.x <= fork
    if not taken.any():
        return [series]
    own = ~taken
    if not own.any():
        return [replace(series, style="dotted")]
    own[np.flatnonzero(taken)[-1]] = True  # the solid part starts where the dotted part ends

    def part(rows: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Series:
        return replace(series, x=series.x[rows], y=series.y[rows])

    return [replace(part(taken), style="dotted", named=False), part(own)]


def stages_begin(run: Run, key: str, column: str = "loss") -> tuple[Column, Column]:
    """Return the start of every stage after the first, as values of ``key`` and of ``column``."""
    metrics = run.metrics
    if "stage" not in metrics:
        return np.empty(0), np.empty(0)
    stage = np.nan_to_num(metrics["stage"], nan=1.0)  # stages may be added to a started run
    begins = np.flatnonzero(np.diff(stage, prepend=stage[0]) > 0)
    return known(metrics[key][begins], metrics[column][begins])
