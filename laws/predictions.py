"""What the planner predicted of runs against what they measured, and what it learns from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.machine import load_hardware
from allometry.laws.runs import read_run
from allometry.scaling.planner.calibrate import Calibration, adapt, predict
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.store import published

EVENT = "step_prediction"


@dataclass(frozen=True)
class Compared:
    """One layout of one run: seconds of a step, measured, and predicted by what was believed
    before and after these runs; ``interval``: 90 %, before."""

    folder: Path
    steps: int
    measured_s: float
    before_s: float
    interval: tuple[float, float]
    after_s: float
    unseen: bool


@dataclass(frozen=True)
class RunCalibration:
    """What runs taught: the belief after them, and each run before and after."""

    belief: Calibration
    compared: tuple[Compared, ...]


def calibrate_runs(folders: Sequence[Path], belief: Calibration | None = None) -> RunCalibration:
    """Update a belief (None: that of published measurements) by the steps that runs recorded.

    Runs write a ``step_prediction`` event every so often: the row of the cost model, what it
    predicted and the median that was measured. Events of one row count once, by their median.
    Raises UserError for a folder that is no run's, or whose run recorded none.
    """
    belief = belief or published()
    found = [one for folder in folders for one in _measured(Path(folder))]
    names = sorted({row["hardware"] for _, row, _, _ in found})
    hardware = {name: load_hardware(name) for name in names}
    cases = Cases.of([row for _, row, _, _ in found], hardware)
    seconds = np.array([measured for _, _, measured, _ in found])
    after = adapt(belief, cases, seconds)
    said, then = predict(belief, cases), predict(after, cases)
    compared = tuple(
        Compared(
            folder,
            steps,
            measured,
            float(said.seconds[index]),
            (float(said.low[index]), float(said.high[index])),
            float(then.seconds[index]),
            bool(said.unseen[index]),
        )
        for index, (folder, _, measured, steps) in enumerate(found)
    )
    return RunCalibration(after, compared)


def _measured(folder: Path) -> list[tuple[Path, dict[str, Any], float, int]]:
    """Return (folder, row, median seconds, steps) of each layout that a run was measured in."""
    events = [event for event in read_run(folder).events if event["event"] == EVENT]
    if not events:
        raise UserError(
            f"{folder} recorded no predicted steps; train with record.prediction.cluster set, for "
            "at least record.prediction.every_steps steps"
        )
    rows: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        rows.setdefault(repr(sorted(event["row"].items())), []).append(event)
    return [
        (
            folder,
            same[0]["row"],
            float(np.median([event["measured_s"] for event in same])),
            sum(event["steps"] for event in same),
        )
        for same in rows.values()
    ]
