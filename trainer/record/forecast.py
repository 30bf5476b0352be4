"""Forecast a run's final loss during training."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from allometry.configs.run import RunConfig
from allometry.laws.forecast import Curve, forecast
from allometry.laws.observations import LearningRates
from allometry.laws.runs import read_lines
from allometry.scaling.stages import places_of
from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.rates import one_curve, with_history
from allometry.trainer.record.writer import Row
from allometry.trainer.state.folder import RunFolder


class Forecaster(Callback):
    """Adds ``forecast/loss``, ``forecast/low`` and ``forecast/high`` to a row every few steps.

    The forecast is the expected training loss of the last step under the run's own schedule
    (``laws/forecast.py``), from all rows so far. A curve continues over training stages that differ
    only in their rates (``one_curve``); if it ends before the run, the forecast is for its last
    step, which an event ``forecast_of_stage`` reports once. A resumed run reads the rows of earlier
    launches from its record. The first recorded row at or after each multiple of ``every_steps``
    has the columns. If no forecast is possible (too few rows), they are omitted and an event
    ``no_forecast`` gives the reason, once per launch; ``forecast_from_prior`` reports once that the
    gain of the decay is not measured. The callback never ends or changes a run. It runs on the main
    rank.
    """

    def __init__(
        self,
        every_steps: int,
        run: RunConfig,
        steps_taken: int,
        folder: RunFolder,
        report: Reporter,
    ) -> None:
        self._every, self._run, self._steps_taken = every_steps, run, steps_taken
        self._folder, self._report = folder, report
        self._curve: tuple[int, int, LearningRates] | None = None
        self._used: list[float] = []  # in the steps of earlier launches
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._due = every_steps
        self._said: set[str] = set()

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Read the rows of earlier launches."""
        for row in read_lines(self._folder.metrics):
            step, loss, lr = row.get("step"), row.get("loss"), row.get("lr")
            numbers = isinstance(loss, float) and isinstance(lr, float | int)
            if isinstance(step, int) and numbers and step < first_step:
                self._steps.append(step)
                self._losses.append(loss)
                self._used.append(float(lr))
        self._due = (first_step - 1) // self._every * self._every + self._every

    @override
    def additions(self, finished: FinishedStep) -> Row:
        if not finished.recorded:
            return {}
        step = finished.step
        self._steps.append(step)
        self._losses.append(finished.loss)
        if step < self._due:
            return {}
        self._due = step // self._every * self._every + self._every
        steps_n, losses_n = np.array(self._steps, np.int64), np.array(self._losses)
        try:
            if self._curve is None:
                first, last, rates = one_curve(self._run, self._steps_taken)
                used_n = np.array(self._used)
                recorded = steps_n[: len(used_n)], used_n
                rates = with_history(rates, self._run.run.branched_at, *recorded)
                self._curve = first, last, rates
            first, last, rates = self._curve
            steps_n, losses_n = steps_n[steps_n >= first], losses_n[steps_n >= first]
            end = forecast([Curve("this run", steps_n, losses_n, rates)], rates)
        except (ValueError, ArithmeticError) as error:  # a UserError is a ValueError
            self._say_once("no_forecast", step, reason=str(error))
            return {}
        if last < places_of(self._run)[-1].last_step:
            self._say_once("forecast_of_stage", step, of_step=last)
        if "gain" in end.quality.unmeasured:
            self._say_once("forecast_from_prior", step, warning=end.warnings[0])
        return {"forecast/loss": end.loss, "forecast/low": end.low, "forecast/high": end.high}

    def _say_once(self, kind: str, step: int, **details: Any) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._report(kind, step=step, **details)
