"""Comparison of the planner's predictions with measured steps of runs, and calibration by them."""

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
    """Step time of one layout of one run: measured, and predicted before and after calibration.

    Seconds; ``interval``: 90 %, before calibration.
    """

    folder: Path
    steps: int
    measured_s: float
    before_s: float
    interval: tuple[float, float]
    after_s: float
    unseen: bool


@dataclass(frozen=True)
class RunCalibration:
    """Calibration by runs, and the comparison of each run before and after."""

    belief: Calibration
    compared: tuple[Compared, ...]


def calibrate_runs(folders: Sequence[Path], belief: Calibration | None = None) -> RunCalibration:
    """Update a calibration (None: from published measurements) by the recorded steps of runs.

    Runs write a ``step_prediction`` event at regular intervals: the row of the cost model, its
    prediction and the measured median. Events of one row count once, by their median. Raises
    UserError: a folder is not a run, or its run has no such event. For example,
    ``calibrate_runs([Path("runs/a")]).belief``.
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
    """Return (folder, row, median seconds, steps) of each layout in which a run was measured."""
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
