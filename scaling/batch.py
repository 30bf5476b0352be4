"""Number of sequences in each step: batch size, batch ramp, and the length of a run in steps."""

# Steps are counted from 1: step s is the s-th update of the optimizer.

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from allometry.configs.data import BatchConfig
from allometry.configs.errors import UserError
from allometry.configs.optimization import ScheduleConfig, TrainingConfig

MOST_STEPS, MOST_TOKENS = 10**9, 10**18


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive steps with one batch size, up to the first step of the next stage.

    ``first_sequence`` and ``first_token`` are the totals of all earlier steps.
    """

    first_step: int
    first_sequence: int
    sequences: int
    first_token: int
    sequence_length: int


class BatchPlan:
    """Sequences of each step, as a pure function of the step.

    With a ramp from b to B sequences in increments of Δ over T tokens, the K = (B−b)/Δ increases
    are spread evenly: a step that begins after c tokens has b + Δ·min(K, ⌊c·K/T⌋) sequences. The
    batch size changes only between steps. ``after`` appends the plan to the steps of another plan,
    whose sequences may have another length. For example, 8 sequences of 512 tokens without a ramp
    have ``tokens_after(2) == 8192``.
    """

    def __init__(self, batch: BatchConfig, sequence_length: int) -> None:
        assert sequence_length > 0, sequence_length
        self.sequence_length = sequence_length
        self.full_sequences = batch.sequences
        self.stages: tuple[Stage, ...] = tuple(_stages(batch, sequence_length))

    def after(self, before: BatchPlan, steps: int) -> BatchPlan:
        """Return this plan appended to the first ``steps`` steps of the plan ``before``."""
        sequences, tokens = before.sequences_before(steps + 1), before.tokens_after(steps)
        made = copy.copy(self)
        made.stages = (
            *(stage for stage in before.stages if stage.first_step <= steps),
            *(
                replace(
                    stage,
                    first_step=stage.first_step + steps,
                    first_sequence=stage.first_sequence + sequences,
                    first_token=stage.first_token + tokens,
                )
                for stage in self.stages
            ),
        )
        return made

    def sequences(self, step: int) -> int:
        """Return the number of sequences of ``step`` (1, 2, ...)."""
        assert step >= 1, step
        return self._stage_at(step).sequences

    def sequences_before(self, step: int) -> int:
        """Return the number of sequences before ``step``: its position in the stream."""
        assert step >= 1, step
        stage = self._stage_at(step)
        return stage.first_sequence + (step - stage.first_step) * stage.sequences

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens before ``step``."""
        stage = self._stage_at(step)
        done = (step - stage.first_step) * stage.sequences
        return stage.first_token + done * stage.sequence_length

    def tokens_after(self, step: int) -> int:
        """Return the number of tokens in the first ``steps`` steps; 0 for 0 steps."""
        return self.tokens_before(step + 1)

    def steps_for_tokens(self, tokens: int) -> int:
        """Return the smallest number of steps with at least ``tokens`` tokens, rounded up."""
        assert tokens >= 0, tokens
        begun = bisect_left(self.stages, tokens, key=lambda stage: stage.first_token)
        stage = self.stages[max(begun - 1, 0)]
        step_tokens = stage.sequences * stage.sequence_length
        return stage.first_step - 1 + -(-(tokens - stage.first_token) // step_tokens)

    def rest(self, step: int) -> BatchPlan:
        """Return the plan of the steps after ``step`` (0: all steps), counted from 1."""
        position, tokens = self.sequences_before(step + 1), self.tokens_after(step)
        begun = replace(self._stage_at(step + 1), first_step=1, first_sequence=0, first_token=0)
        later = [
            replace(
                one,
                first_step=one.first_step - step,
                first_sequence=one.first_sequence - position,
                first_token=one.first_token - tokens,
            )
            for one in self.stages
            if one.first_step > step + 1
        ]
        plan = copy.copy(self)
        plan.stages = (begun, *later)
        return plan

    def _stage_at(self, step: int) -> Stage:
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]


def total_steps(training: TrainingConfig, plan: BatchPlan) -> int:
    """Return the length of the run in steps; a token budget is rounded up to complete steps.

    For example, 10,000 tokens in steps of 4,096 tokens are 3 steps.

    Raises:
        UserError: the run has more than ``MOST_STEPS`` steps or ``MOST_TOKENS`` tokens.
    """
    key, steps = "total_steps", training.total_steps
    if steps is None:
        assert training.total_tokens is not None
        key, steps = "total_tokens", plan.steps_for_tokens(training.total_tokens)
    if steps > MOST_STEPS:
        raise UserError(
            f"training.{key}={getattr(training, key)} makes {steps} steps, more than any run takes "
            f"({MOST_STEPS}); lower it or raise batch.sequences"
        )
    if plan.tokens_after(steps) > MOST_TOKENS:
        raise UserError(
            f"training.{key}={getattr(training, key)} makes {plan.tokens_after(steps)} tokens, "
            f"more than any run reads ({MOST_TOKENS}); lower it, batch.sequences or "
            "data.sequence_length"
        )
    return steps


def warmup_steps(schedule: ScheduleConfig, plan: BatchPlan) -> int:
    """Return the length of the warm-up in steps; tokens are rounded up to complete steps.

    ``plan``: the plan that begins at the first step of the schedule.
    """
    if schedule.warmup_steps is not None:
        return schedule.warmup_steps
    return plan.steps_for_tokens(schedule.warmup_tokens or 0)


def check_batch(batch: BatchConfig, hdp: int) -> None:
    """Raise UserError unless hdp ranks can divide each batch into complete micro-batches.

    The message names the key, its value and the nearest valid values.
    """
    unit = hdp * batch.micro_batch_sequences
    share = f"hdp={hdp} x batch.micro_batch_sequences={batch.micro_batch_sequences}"
    if batch.sequences % unit:
        raise UserError(
            f"batch.sequences={batch.sequences} cannot be divided by {share}; use "
            f"{_smaller_micro_batch(batch, hdp)}batch.sequences={_nearest(batch.sequences, unit)}"
        )
    for name in ("start_sequences", "increment_sequences") if batch.ramp else ():
        value = getattr(batch.ramp, name)
        if value % unit:
            raise UserError(
                f"batch.ramp.{name}={value} cannot be divided by {share}, as each stage of the "
                f"ramp must be; use {_nearest(value, unit)}"
            )


def _smaller_micro_batch(batch: BatchConfig, hdp: int) -> str:
    """Return a change of the micro-batch size that keeps the batch size; empty if none exists."""
    if batch.sequences % hdp:
        return ""
    each = batch.sequences // hdp
    fits = max(m for m in range(1, batch.micro_batch_sequences + 1) if each % m == 0)
    return f"batch.micro_batch_sequences={fits}, or "


def _nearest(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


def _stages(batch: BatchConfig, sequence_length: int) -> Iterator[Stage]:
    ramp = batch.ramp
    if ramp is None:
        yield Stage(1, 0, batch.sequences, 0, sequence_length)
        return
    step, position = 1, 0
    increases = (batch.sequences - ramp.start_sequences) // ramp.increment_sequences
    for stage in range(increases):
        # The stage ends with the first step that begins at or after this many sequences:
        # ceil((stage + 1) · T / (K · L)), in integers.
        limit = -(-(stage + 1) * ramp.over_tokens // (increases * sequence_length))
        if limit <= position:
            continue  # a single step has passed this stage
        sequences = ramp.start_sequences + stage * ramp.increment_sequences
        yield Stage(step, position, sequences, position * sequence_length, sequence_length)
        steps = -(-(limit - position) // sequences)
        step, position = step + steps, position + steps * sequences
    yield Stage(step, position, batch.sequences, position * sequence_length, sequence_length)
