"""A run's own forecast of its final loss, logged while it trains."""

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forecast import Curve, forecast
from allometry.laws.observations import LearningRates
from allometry.laws.runs import read_lines
from allometry.optim.schedule import Schedule
from allometry.trainer.record.callbacks import Callback, Report
from allometry.trainer.record.rates import rates_of
from allometry.trainer.record.writer import Row
from allometry.trainer.state.folder import RunFolder


class Forecaster(Callback):
    """Adds ``forecast/loss``, ``forecast/low`` and ``forecast/high`` to a row each few steps.

    They are of the expected training loss of the last step under the run's own schedule
    (``laws/forecast.py``), from all rows so far; a resumed run reads those of earlier launches from
    its record. The first recorded row at or after each multiple of ``every_steps`` has them. Where
    there can be none (too few rows) the row has none and an event ``no_forecast`` says why, once in
    a launch; ``forecast_from_prior`` says once that the decay's gain is not measured. Nothing here
    ends or changes a run.
    """

    def __init__(self, every_steps: int, schedule: Schedule, peak: float, folder: RunFolder):
        self._every, self._schedule, self._peak = every_steps, schedule, peak
        self._folder = folder
        self._rates: LearningRates | None = None
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._due = every_steps
        self._said: set[str] = set()

    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Read what earlier launches recorded."""
        for row in read_lines(self._folder.metrics):
            if row["step"] < first_step:
                self._steps.append(int(row["step"]))
                self._losses.append(float(row["loss"]))
        self._due = (first_step - 1) // self._every * self._every + self._every

    def additions(self, row: Row, report: Report) -> Row:
        """Return the forecast, if its turn has come."""
        step = int(row["step"])
        self._steps.append(step)
        self._losses.append(float(row["loss"]))
        if step < self._due:
            return {}
        self._due = step // self._every * self._every + self._every
        try:
            found = forecast([self._curve()], self._whole_run())
        except (ValueError, ArithmeticError) as error:  # a UserError is a ValueError
            self._say_once(report, "no_forecast", step, reason=str(error))
            return {}
        if "gain" in found.quality.unmeasured:
            self._say_once(report, "forecast_from_prior", step, warning=found.warnings[0])
        return {
            "forecast/loss": found.loss,
            "forecast/low": found.low,
            "forecast/high": found.high,
        }

    def _curve(self) -> Curve:
        steps_n = np.array(self._steps, np.int64)
        return Curve("this run", steps_n, np.array(self._losses), self._whole_run())

    def _whole_run(self) -> LearningRates:
        if self._rates is None:
            self._rates = rates_of(self._schedule, self._peak)
        return self._rates

    def _say_once(self, report: Report, kind: str, step: int, **details: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            report(kind, step=step, **details)
