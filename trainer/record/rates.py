"""The learning rate of each step of a schedule, for laws of whole curves."""

from __future__ import annotations

import numpy as np

from allometry.configs.run import RunConfig
from allometry.laws.observations import LearningRates
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.scaling.batch import BatchPlan


def rates_of(schedule: Schedule, peak: float) -> LearningRates:
    """Return the rate of each step of a schedule whose fraction 1 is ``peak``."""
    fractions = [schedule.fraction(step) for step in range(1, schedule.total_steps + 1)]
    return LearningRates(peak * np.array(fractions), schedule.warmup_steps)


def planned_rates(config: RunConfig) -> LearningRates:
    """Return the rate of each step that a run's configuration plans."""
    plan = BatchPlan(config.batch, config.data.sequence_length)
    return rates_of(resolve_schedule(config, plan), config.optimizer.lr)
