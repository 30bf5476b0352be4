"""How many sequences each step holds: the batch, its ramp, and the length of a run in steps."""

# Steps are counted from 1: step s is the s-th update of the optimizer.

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from allometry.configs.data import BatchConfig
from allometry.configs.errors import UserError
from allometry.configs.optimization import ScheduleConfig, TrainingConfig


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of steps with one batch size, until the next stage's first step."""

    first_step: int
    first_sequence: int
    sequences: int


class BatchPlan:
    """Which sequences each step takes: a pure function of the step.

    With a ramp from b to B sequences in increments of Δ over T tokens, the K = (B−b)/Δ increases
    are spread evenly: a step that begins after c tokens holds b + Δ·min(K, ⌊c·K/T⌋) sequences.
    The batch only changes between steps.
    """

    def __init__(self, batch: BatchConfig, sequence_length: int) -> None:
        assert sequence_length > 0, sequence_length
        self.sequence_length = sequence_length
        self.full_sequences = batch.sequences
        self.stages: tuple[Stage, ...] = tuple(_stages(batch, sequence_length))

    def sequences(self, step: int) -> int:
        """Return how many sequences this step (1, 2, ...) holds."""
        assert step >= 1, step
        return self._stage_at(step).sequences

    def sequences_before(self, step: int) -> int:
        """Return how many sequences all steps before this one hold: its position in the stream."""
        assert step >= 1, step
        stage = self._stage_at(step)
        return stage.first_sequence + (step - stage.first_step) * stage.sequences

    def tokens_before(self, step: int) -> int:
        """Return how many tokens all steps before this one hold."""
        return self.sequences_before(step) * self.sequence_length

    def tokens_after(self, step: int) -> int:
        """Return how many tokens the first ``step`` steps hold (0 steps: none)."""
        return self.tokens_before(step + 1)

    def steps_for_tokens(self, tokens: int) -> int:
        """Return the fewest steps that hold at least this many tokens: the last one is whole."""
        assert tokens >= 0, tokens
        wanted = -(-tokens // self.sequence_length)
        begun = bisect_left(self.stages, wanted, key=lambda stage: stage.first_sequence)
        stage = self.stages[max(begun - 1, 0)]
        return stage.first_step - 1 + -(-(wanted - stage.first_sequence) // stage.sequences)

    def after(self, step: int) -> BatchPlan:
        """Return the plan of the steps after this one (0: of all), counted from 1 again."""
        position, begun = self.sequences_before(step + 1), self._stage_at(step + 1)
        later = [
            Stage(one.first_step - step, one.first_sequence - position, one.sequences)
            for one in self.stages
            if one.first_step > step + 1
        ]
        plan = copy.copy(self)
        plan.stages = (Stage(1, 0, begun.sequences), *later)
        return plan

    def _stage_at(self, step: int) -> Stage:
        return self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]


def total_steps(training: TrainingConfig, plan: BatchPlan) -> int:
    """Return the length of the run in steps; a budget in tokens is rounded up to whole steps."""
    if training.total_steps is not None:
        return training.total_steps
    assert training.total_tokens is not None
    return plan.steps_for_tokens(training.total_tokens)


def warmup_steps(schedule: ScheduleConfig, plan: BatchPlan, begin: int = 0) -> int:
    """Return the step at which the warm-up ends; tokens are rounded up to whole steps.

    ``begin``: the step after which the schedule counts (``run.schedule_from``).
    """
    if schedule.warmup_steps is not None:
        return begin + schedule.warmup_steps
    return begin + plan.after(begin).steps_for_tokens(schedule.warmup_tokens or 0)


def check_batch(batch: BatchConfig, hdp: int) -> None:
    """Raise UserError unless hdp ranks can share each batch in whole micro-batches.

    It names the key, its value and the nearest values that work.
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
    """The change that leaves the batch as it is, where there is one."""
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
        yield Stage(1, 0, batch.sequences)
        return
    step, position = 1, 0
    increases = (batch.sequences - ramp.start_sequences) // ramp.increment_sequences
    for stage in range(increases):
        # The stage ends with the first step that begins at or after this many sequences:
        # ceil((stage + 1) · T / (K · L)), in whole numbers.
        limit = -(-(stage + 1) * ramp.over_tokens // (increases * sequence_length))
        if limit <= position:
            continue  # a single step jumped over this stage
        sequences = ramp.start_sequences + stage * ramp.increment_sequences
        yield Stage(step, position, sequences)
        steps = -(-(limit - position) // sequences)
        step, position = step + steps, position + steps * sequences
    yield Stage(step, position, batch.sequences)
