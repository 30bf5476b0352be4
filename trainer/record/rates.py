"""The learning rate of each step of a schedule, for laws of whole curves."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from allometry.configs.run import RunConfig
from allometry.laws.observations import LearningRates
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.scaling.batch import BatchPlan


def rates_of(schedule: Schedule, peak: float) -> LearningRates:
    """Return the rate of each step of a schedule whose fraction 1 is ``peak``.

    Of steps before the one that it begins with it says nothing: NaN.
    """
    fractions = [math.nan] * schedule.begin_step
    steps = range(schedule.begin_step + 1, schedule.total_steps + 1)
    fractions += [schedule.fraction(step) for step in steps]
    return LearningRates(peak * np.array(fractions), schedule.warmup_steps)


def planned_rates(config: RunConfig) -> LearningRates:
    """Return the rate of each step that a run's configuration plans."""
    plan = BatchPlan(config.batch, config.data.sequence_length)
    return rates_of(resolve_schedule(config, plan), config.optimizer.lr)


def with_history(
    rates: LearningRates,
    branched_at: int,
    steps_n: NDArray[np.int64],
    used_n: NDArray[np.float64],
) -> LearningRates:
    """Return the rates of a run whose first ``branched_at`` steps are those of its parent.

    Where the parent recorded (``steps_n``, ``used_n``) other rates than its branch would have had,
    all of them are from the record, on straight lines between what it has.
    """
    known = steps_n <= min(branched_at, len(rates.rates))
    steps, used = steps_n[known], used_n[known]
    if not known.any() or np.allclose(rates.rates[steps - 1], used, rtol=1e-9, atol=0.0):
        return rates
    filled = rates.rates.copy()
    filled[:branched_at] = np.interp(np.arange(1, branched_at + 1), steps, used)
    return LearningRates(filled, rates.warmup_steps)
