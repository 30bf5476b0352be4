"""Compare the planner's predicted step time with the measured time."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from typing_extensions import override

from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from allometry.laws.predictions import EVENT
from allometry.parallel.mesh import Mesh
from allometry.scaling.layout import Layout
from allometry.scaling.planner.calibrate import predict
from allometry.scaling.planner.store import published
from allometry.scaling.search.case import Case
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Row

WARM_UP = 3  # steps of a launch that compile, measure kernels or fill buffers


class StepPrediction(Callback):
    """Writes an event ``step_prediction`` every few steps: predicted and measured seconds.

    The event contains the cost model's row, so that ``laws/predictions.py`` can calibrate on it;
    ``predicted_s`` with the ends of its 90 % interval; ``measured_s``, the median of the steps
    since the last event, without the first ``WARM_UP`` of a launch; and ``left_out``, properties
    that the row does not describe. The callback never ends or changes a run. It runs on every rank;
    the main rank writes the event.
    """

    def __init__(self, facts: dict[str, Any], every_steps: int, report: Reporter) -> None:
        self._facts, self._every, self._report = facts, every_steps, report
        self._seconds: list[float] = []
        self._skip = WARM_UP

    @override
    def additions(self, finished: FinishedStep) -> Row:
        if self._skip:
            self._skip -= 1
            return {}
        self._seconds.append(finished.seconds)
        if len(self._seconds) >= self._every:
            measured = statistics.median(self._seconds)
            self._report(
                EVENT,
                step=finished.step,
                steps=len(self._seconds),
                measured_s=measured,
                **self._facts,
            )
            self._seconds.clear()
        return {}


def predictions(
    config: RunConfig, layout: Layout, mesh: Mesh, report: Reporter
) -> Iterator[StepPrediction]:
    """Yield the callback if ``record.prediction.cluster`` names a hardware description.

    The result is the same on every rank. Raises UserError for an unknown ``cluster``, or one
    without a rate for the run's types.
    """
    cluster = config.record.prediction.cluster
    if cluster is None:
        return
    hardware = load_hardware(cluster)
    case = Case.of(config, hardware, layout=layout, name=cluster, device=mesh.device.type)
    said = predict(published(hardware), case.cases(hardware))
    facts = {
        "predicted_s": float(said.seconds[0]),
        "low_s": float(said.low[0]),
        "high_s": float(said.high[0]),
        "unseen": bool(said.unseen[0]),
        "row": case.row,
        "left_out": list(case.left_out),
    }
    yield StepPrediction(facts, config.record.prediction.every_steps, report)
