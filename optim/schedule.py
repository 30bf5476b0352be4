"""Learning-rate schedules: pure functions of the step, without torch."""

# Steps are counted from 1; W warm-up steps, T steps of the run, S the last step at the peak.

from __future__ import annotations

import math
from typing import assert_never

from allometry.configs.errors import UserError
from allometry.configs.optimization import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    ScheduleConfig,
    WSDSchedule,
)
from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan, total_steps, warmup_steps


class Schedule:
    """The learning rate of each step as a fraction of the peak.

    ``fraction(s)`` is what the s-th update uses, s = 1 ... T:

    * s <= W: s/W, so that step W is the first at the peak (MiniCPM, arXiv 2404.06395, section 4);
    * s <= S: 1. S is W for linear and cosine, T for constant and, for WSD,
      T − max(1, round(decay_fraction·T));
    * s > S: f(x) with x = (s−S)/(T−S), which runs from just above 0 to exactly 1 at the last
      step. f(0) = 1: there is no jump after step S. f(1) = ``final_fraction`` = r: the last
      update uses exactly that.

    Forms f: linear 1−(1−r)x; cosine r+(1−r)(1+cos πx)/2; exponential r^x; 1-sqrt
    r+(1−r)(1−√x) (arXiv 2405.18392).

    Raises:
        UserError: the warm-up leaves no room for the decay, or is longer than the run.
    """

    def __init__(self, config: ScheduleConfig, total_steps: int, warmup_steps: int) -> None:
        assert total_steps >= 1, total_steps
        assert warmup_steps >= 0, warmup_steps
        self.config = config
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.decay_start = self._decay_start()
        self._check()

    def fraction(self, step: int) -> float:
        """Return the learning rate of this step (1 ... total_steps) over the peak rate."""
        assert 1 <= step <= self.total_steps, (step, self.total_steps)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step <= self.decay_start:
            return 1.0
        x = (step - self.decay_start) / (self.total_steps - self.decay_start)
        return _decayed(self.config, x)

    def _decay_start(self) -> int:
        if isinstance(self.config, ConstantSchedule):
            return self.total_steps
        if isinstance(self.config, WSDSchedule):
            length = max(1, round(self.config.decay_fraction * self.total_steps))
            return self.total_steps - length
        return self.warmup_steps

    def _check(self) -> None:
        if self.warmup_steps > self.total_steps:
            raise UserError(
                f"schedule: a warm-up of {self.warmup_steps} steps is longer than the run, "
                f"{self.total_steps} steps; shorten schedule.warmup_steps (or warmup_tokens) or "
                "lengthen training.total_tokens (or total_steps)"
            )
        if isinstance(self.config, ConstantSchedule):
            return
        if not self.warmup_steps <= self.decay_start < self.total_steps:
            raise UserError(
                f"schedule: the decay of kind={self.config.kind} begins after step "
                f"{self.decay_start} of {self.total_steps}, but the warm-up takes "
                f"{self.warmup_steps} steps; shorten the warm-up or the decay"
            )


def _decayed(config: ScheduleConfig, x: float) -> float:
    """Return f(x), 0 < x <= 1, of the schedule's decay."""
    match config:
        case ConstantSchedule():
            return 1.0
        case LinearSchedule():
            return _linear(x, config.final_fraction)
        case CosineSchedule():
            r = config.final_fraction
            return r + (1.0 - r) * 0.5 * (1.0 + math.cos(math.pi * x))
        case WSDSchedule(decay="exponential"):
            return float(config.final_fraction**x)
        case WSDSchedule(decay="linear"):
            return _linear(x, config.final_fraction)
        case WSDSchedule(decay="1-sqrt"):
            r = config.final_fraction
            return r + (1.0 - r) * (1.0 - math.sqrt(x))
        case WSDSchedule():
            raise AssertionError(config.decay)
        case _:
            assert_never(config)


def _linear(x: float, final: float) -> float:
    return final + (1.0 - final) * (1.0 - x)


def resolve_schedule(config: RunConfig, batch_plan: BatchPlan) -> Schedule:
    """Return the schedule of a run, with tokens turned into steps by its batch plan.

    Raises:
        UserError: see ``Schedule``.
    """
    return Schedule(
        config.schedule,
        total_steps=total_steps(config.training, batch_plan),
        warmup_steps=warmup_steps(config.schedule, batch_plan),
    )
