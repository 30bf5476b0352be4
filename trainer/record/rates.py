"""The learning rate of each step of a schedule, for laws of whole curves."""

from __future__ import annotations

import numpy as np

from allometry.laws.observations import LearningRates
from allometry.optim.schedule import Schedule


def rates_of(schedule: Schedule, peak: float) -> LearningRates:
    """Return the rate of each step of a schedule whose fraction 1 is ``peak``."""
    fractions = [schedule.fraction(step) for step in range(1, schedule.total_steps + 1)]
    return LearningRates(peak * np.array(fractions), schedule.warmup_steps)
