"""Learning rate schedules: pure functions of the step, without torch."""

# Steps are counted from 1; W warm-up steps, T steps of the run, S the last step at the peak.

from __future__ import annotations

import math
from bisect import bisect_left
from pathlib import Path
from typing import Protocol, assert_never

from typing_extensions import override

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.configs.optimization import (
    ConstantSchedule,
    ContinuedSchedule,
    CosineSchedule,
    LinearSchedule,
    RefinedSchedule,
    ScheduleConfig,
    WSDSchedule,
    WSDSSchedule,
)
from allometry.configs.run import RunConfig
from allometry.scaling.batch import BatchPlan, total_steps, warmup_steps
from allometry.scaling.stages import StagePlace, places_of

REFINED = "allometry.schedule"
"""Value of ``kind`` in the file of a refined schedule."""

OneDecay = ConstantSchedule | LinearSchedule | CosineSchedule | WSDSchedule


class Stretch(Protocol):
    """Schedule of consecutive steps, counted from 1 at its first step."""

    total_steps: int
    decay_start: int

    def fraction(self, step: int) -> float:
        """Return the learning rate of ``step`` divided by the peak rate."""

    def flat_until(self, step: int) -> int:
        """Return the last step from ``step`` on that certainly has the same rate."""


class Schedule:
    """Learning rate of each step as a fraction of the peak.

    ``fraction(s)`` is used by the s-th update, s = 1 ... T. A schedule consists of one or more
    consecutive stretches: see ``Decay`` and ``Refined`` for the rates of a stretch.

    * ``wsd_s`` (arXiv 2410.05192): one WSD stretch for each decay end e, the last one ending at T.
      Each decay takes max(1, round(decay_fraction·e)) steps, so up to e the first stretch has the
      rates of a run of ``kind: wsd`` with length e. Later stretches warm up from ``final_fraction``
      to the peak in ``rewarmup_steps``.
    * ``continued``: ``before`` as in a run that ends at ``before_steps``, then ``after``, whose
      warm-up starts at the last rate of ``before``.

    ``batch_plan`` converts tokens in the schedule to steps. ``decay_start`` is the last step before
    the last decay. With ``after`` > 0 the schedule starts after step ``after`` of a run, as in a
    later stage or a continued run: s, the warm-up, ``total_steps`` and tokens count from there,
    while the attributes count from the first step of the run. The warm-up then starts from
    ``begin``, the previous rate over this schedule's peak. For example, a linear schedule to 0 with
    ``total_steps=100`` and ``warmup_steps=10`` has ``fraction(5) == 0.5`` and ``fraction(55) ==
    0.5``.

    Raises:
        UserError: a warm-up leaves no steps for a decay, or is longer than its stretch; a stretch
            ends after the run; the file of a refined schedule cannot be used.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        total_steps: int,
        warmup_steps: int,
        batch_plan: BatchPlan | None = None,
        *,
        after: int = 0,
        begin: float = 0.0,
    ) -> None:
        assert total_steps >= 1, total_steps
        assert warmup_steps >= 0, warmup_steps
        self.config = config
        self.total_steps = after + total_steps
        self.warmup_steps = after + warmup_steps
        self._stretches = _stretches(config, total_steps, warmup_steps, batch_plan, begin)
        self._ends = [after]
        for stretch in self._stretches:
            self._ends.append(self._ends[-1] + stretch.total_steps)
        assert self._ends[-1] == self.total_steps, (self._ends, total_steps)
        self.decay_start = self._ends[-2] + self._stretches[-1].decay_start

    @property
    def first_step(self) -> int:
        """First step of the schedule."""
        return self._ends[0] + 1

    @property
    def ends(self) -> tuple[int, ...]:
        """Last steps of the stretches, including the last step of the run."""
        return tuple(self._ends[1:])

    def fraction(self, step: int) -> float:
        """Return the rate of ``step`` (after + 1 ... total_steps) divided by the peak rate."""
        assert self._ends[0] < step <= self.total_steps, (step, self._ends)
        number = bisect_left(self._ends, step) - 1
        return self._stretches[number].fraction(step - self._ends[number])

    def flat_until(self, step: int) -> int:
        """Return the last step from ``step`` on that certainly has the same rate."""
        number = bisect_left(self._ends, step) - 1
        return self._ends[number] + self._stretches[number].flat_until(step - self._ends[number])


class Decay(Stretch):
    """Warm-up, peak and one decay.

    * s <= W: b + (1−b)·s/W, so that step W is the first at the peak (MiniCPM, arXiv 2404.06395,
      section 4); b = ``begin`` is 0 at the start of a run;
    * s <= S: 1. S is W for linear and cosine, T for constant and T − ``decay_steps`` for WSD, by
      default max(1, round(decay_fraction·T));
    * s > S: f(x) with x = (s−S)/(T−S), from just above 0 to exactly 1 at the last step. f(0) = 1:
      the rate is continuous after step S. f(1) = ``final_fraction`` = r: the last update uses
      exactly r. With r = 0 the last update changes states but no weights (docs/schedules.md).

    Forms of f: linear 1−(1−r)x; cosine r+(1−r)(1+cos πx)/2; exponential r^x; 1-sqrt r+(1−r)(1−√x)
    (arXiv 2405.18392). For example, linear with W = 10 and T = 100 has rate 0.5 at steps 5 and, for
    r = 0, 55.
    """

    def __init__(
        self,
        config: OneDecay,
        total_steps: int,
        warmup_steps: int,
        begin: float = 0.0,
        decay_steps: int | None = None,
    ) -> None:
        self.config, self.total_steps = config, total_steps
        self._warmup_steps, self._begin = warmup_steps, begin
        if isinstance(config, ConstantSchedule):
            self.decay_start = total_steps
        elif isinstance(config, WSDSchedule):
            length = decay_steps or max(1, round(config.decay_fraction * total_steps))
            self.decay_start = total_steps - length
        else:
            self.decay_start = warmup_steps
        self._check()

    @override
    def fraction(self, step: int) -> float:
        if step < self._warmup_steps:
            return self._begin + (1.0 - self._begin) * (step / self._warmup_steps)
        if step <= self.decay_start:
            return 1.0
        x = (step - self.decay_start) / (self.total_steps - self.decay_start)
        return _decayed(self.config, x)

    @override
    def flat_until(self, step: int) -> int:
        return max(step, self.decay_start) if step >= self._warmup_steps else step

    def _check(self) -> None:
        if self._warmup_steps > self.total_steps:
            raise UserError(
                f"schedule: a warm-up of {self._warmup_steps} steps is longer than the run, "
                f"{self.total_steps} steps; shorten schedule.warmup_steps (or warmup_tokens) or "
                "lengthen training.total_tokens (or total_steps)"
            )
        if isinstance(self.config, ConstantSchedule):
            return
        if not self._warmup_steps <= self.decay_start < self.total_steps:
            raise UserError(
                f"schedule: the decay of kind={self.config.kind} begins after step "
                f"{self.decay_start} of {self.total_steps}, but the warm-up takes "
                f"{self._warmup_steps} steps; shorten the warm-up or the decay"
            )


class Refined(Stretch):
    """Given fractions, one for each step, interpolated linearly for another number of steps."""

    def __init__(
        self, fractions: tuple[float, ...], total_steps: int, warmup_steps: int, begin: float
    ) -> None:
        self._fractions, self.total_steps = fractions, total_steps
        self._warmup_steps, self._begin = warmup_steps, begin
        self.decay_start = max(warmup_steps, 1)

    @override
    def fraction(self, step: int) -> float:
        last = len(self._fractions) - 1
        place = (step - 1) * last / max(self.total_steps - 1, 1)
        index = min(int(place), last)
        value = self._fractions[index]
        if place > index:
            value += (place - index) * (self._fractions[index + 1] - value)
        if step < self._warmup_steps:
            share = step / self._warmup_steps
            return self._begin * (1.0 - share) + value * share
        return value

    @override
    def flat_until(self, step: int) -> int:
        return step


def _stretches(
    config: ScheduleConfig, total: int, warmup: int, plan: BatchPlan | None, begin: float
) -> list[Stretch]:
    match config:
        case WSDSSchedule():
            return _several_decays(config, total, warmup, plan, begin)
        case RefinedSchedule():
            return [Refined(read_refined(config.file), total, warmup, begin)]
        case ContinuedSchedule():
            done = config.before_steps
            _check_inside("before_steps", done, total)
            first = _stretches(config.before, done, warmup, plan, begin)
            last = first[-1].fraction(first[-1].total_steps)
            climb = _steps_after(done, config.after.warmup_steps, config.after.warmup_tokens, plan)
            # Decay ends in ``after`` count from the first step of ``after``.
            return [*first, *_stretches(config.after, total - done, climb, None, last)]
        case _:
            return [Decay(config, total, warmup, begin)]


def _several_decays(
    config: WSDSSchedule, total: int, warmup: int, plan: BatchPlan | None, begin: float
) -> list[Stretch]:
    ends = config.decay_ends_steps
    if ends is None:
        if plan is None:
            raise UserError("schedule.after: give decay_ends_steps; decay_ends_tokens is not known")
        ends = tuple(plan.steps_for_tokens(tokens) for tokens in config.decay_ends_tokens or ())
    shape = WSDSchedule(
        decay=config.decay,
        decay_fraction=config.decay_fraction,
        final_fraction=config.final_fraction,
    )
    stretches: list[Stretch] = []
    start = 0
    for end in ends:
        _check_inside("decay_ends", end, total)
    for end in (*ends, total):
        length = max(1, round(config.decay_fraction * end))
        stretches.append(Decay(shape, end - start, warmup, begin, decay_steps=length))
        start, warmup, begin = end, config.rewarmup_steps, config.final_fraction
    return stretches


def _steps_after(done: int, steps: int | None, tokens: int | None, plan: BatchPlan | None) -> int:
    """Return the steps of a warm-up that begins after ``done`` steps."""
    if steps is not None or not tokens:
        return steps or 0
    assert plan is not None, "tokens without a plan of the batch"
    return plan.steps_for_tokens(plan.tokens_after(done) + tokens) - done


def _check_inside(key: str, step: int, total: int) -> None:
    if not 0 < step < total:
        raise UserError(
            f"schedule.{key}: step {step} is not before the end of the run, {total} steps; "
            "lengthen training.total_tokens (or total_steps) or leave it out"
        )


def read_refined(file: str | Path) -> tuple[float, ...]:
    """Return the fractions of a file written by ``laws/refine.py``.

    Raises:
        UserError: the file is missing or is not a refined schedule.
    """
    try:
        content = json_file.read_object(file)
        if content["kind"] != REFINED:
            raise ValueError(f"its kind is {content['kind']!r}")
        fractions = tuple(float(value) for value in content["fractions"])
        if not fractions or not all(0.0 <= value <= 1.0 for value in fractions):
            raise ValueError("its fractions are not all between 0 and 1")
    except OSError as error:
        raise UserError(
            f"schedule.file={file} cannot be read: {error.strerror}; write it with allometry refine"
        ) from None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(
            f"schedule.file={file} is not a refined schedule ({error}); write one with allometry "
            "refine"
        ) from None
    return fractions


def _decayed(config: OneDecay, x: float) -> float:
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
    """Return the schedule of a run, with tokens converted to steps by its batch plan.

    For example, ``resolve_schedule(config, batch_plan).fraction(1)``.

    Raises:
        UserError: see ``Schedule``.
    """
    begun, total = config.run.schedule_from, total_steps(config.training, batch_plan)
    if total <= begun:
        raise UserError(
            f"training asks for {total} steps in all, and the schedule begins after step {begun} "
            "of them, so that none is left; raise training.total_steps (or total_tokens)"
        )
    rest = batch_plan.rest(begun)
    climb = warmup_steps(config.schedule, rest)
    return Schedule(config.schedule, total - begun, climb, rest, after=begun)


def schedules_of(config: RunConfig) -> tuple[Schedule, ...]:
    """Return the schedules of all stages of a run; a run without stages has one.

    Each schedule counts from the first step of its stage, and its fractions refer to the stage's
    peak.

    Raises:
        UserError: see ``Schedule``; the message names the stage.
    """
    if config.stages is None:
        plan = BatchPlan(config.batch, config.data.sequence_length)
        return (resolve_schedule(config, plan),)
    places, schedules = places_of(config), list[Schedule]()
    for place in places:
        before, one = schedules[-1] if schedules else None, place.config
        begin = 0.0
        if before is not None:
            peak = places[len(schedules) - 1].config.optimizer.lr
            begin = before.fraction(before.total_steps) * (peak / one.optimizer.lr)
        try:
            climb = warmup_steps(one.schedule, place.local)
            _check_climb(place, climb)
            made = Schedule(
                *(one.schedule, place.steps, climb, place.local),
                after=place.steps_before,
                begin=begin,
            )
        except UserError as error:
            if place.name is None:
                raise
            raise UserError(f"stage {place.name}: {error}") from None
        schedules.append(made)
    return tuple(schedules)


def _check_climb(place: StagePlace, climb: int) -> None:
    """Reject a stage shorter than its warm-up; ``Decay`` rejects a run that is too short."""
    if place.name is not None and climb > place.steps:
        raise UserError(
            f"its warm-up of {climb} steps is longer than the stage, {place.steps} steps; shorten "
            "schedule.warmup_steps (or warmup_tokens) or lengthen the stage's steps (or tokens)"
        )
