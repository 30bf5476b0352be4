"""Return the learning rate of each step of a schedule, for laws of loss curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.run import RunConfig
from allometry.laws.observations import LearningRates
from allometry.optim.schedule import Schedule, schedules_of
from allometry.scaling.stages import place_at, places_of


def rates_of(schedule: Schedule, peak: float) -> LearningRates:
    """Return the rate of each step of a schedule with peak rate ``peak``."""
    steps = range(schedule.first_step, schedule.total_steps + 1)
    return LearningRates(
        peak * np.array([schedule.fraction(step) for step in steps]), schedule.warmup_steps
    )


def planned_rates(config: RunConfig, stages: int | None = None) -> LearningRates:
    """Return the planned rate of each step of a run, or of its first ``stages`` training stages.

    Rates before the first step of the schedule are NaN.
    """
    schedules = schedules_of(config)
    parts = [
        rates_of(schedule, place.config.optimizer.lr)
        for place, schedule in zip(places_of(config), schedules, strict=True)
    ][:stages]
    unknown_n = np.full(schedules[0].first_step - 1, np.nan)
    rates_n = np.concatenate([unknown_n, *(part.rates for part in parts)])
    return LearningRates(rates_n, parts[0].warmup_steps)


def with_history(
    rates: LearningRates,
    branched_at: int,
    steps_n: NDArray[np.int64],
    used_n: NDArray[np.float64],
) -> LearningRates:
    """Return the rates of a run whose first ``branched_at`` steps were taken by its parent.

    If the parent's recorded rates (``steps_n``, ``used_n``) differ from the rates of its branch,
    all of these steps use the recorded rates, interpolated linearly between rows.
    """
    known = steps_n <= min(branched_at, len(rates.rates))
    steps, used = steps_n[known], used_n[known]
    if not known.any() or np.allclose(rates.rates[steps - 1], used, rtol=1e-9, atol=0.0):
        return rates
    filled = rates.rates.copy()
    filled[:branched_at] = np.interp(np.arange(1, branched_at + 1), steps, used)
    return LearningRates(filled, rates.warmup_steps)


def one_curve(config: RunConfig, steps_taken: int) -> tuple[int, int, LearningRates]:
    """Return first and last step of the loss curve at the next step, and the rates up to its end.

    Consecutive stages that differ only in schedule, peak rate and length form one curve.
    """
    places = places_of(config)
    at = place_at(places, steps_taken).number - 1
    alike = [_but_rates(place.config) == _but_rates(places[at].config) for place in places]
    first = max((n + 1 for n in range(at) if not alike[n]), default=0)
    end = next((n for n in range(at, len(places)) if not alike[n]), len(places))
    return places[first].steps_before + 1, places[end - 1].last_step, planned_rates(config, end)


def _but_rates(config: RunConfig) -> dict[str, Any]:
    said = config.model_dump(mode="json", exclude={"schedule"})
    for section, key in (("optimizer", "lr"), ("training", "total_steps")):
        del said[section][key]
    del said["training"]["total_tokens"]
    return said
