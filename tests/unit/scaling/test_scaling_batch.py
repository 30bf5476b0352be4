from __future__ import annotations

import random

import pytest

from allometry.configs.data import BatchConfig, BatchRamp
from allometry.configs.errors import UserError
from allometry.configs.optimization import ConstantSchedule, TrainingConfig
from allometry.scaling.batch import (
    BatchPlan,
    check_batch,
    total_steps,
    warmup_steps,
)


def ramped(start: int, increment: int, full: int, tokens: int, micro: int = 1) -> BatchConfig:
    return BatchConfig(
        sequences=full,
        micro_batch_sequences=micro,
        ramp=BatchRamp(start_sequences=start, increment_sequences=increment, over_tokens=tokens),
    )


def walk(batch: BatchConfig, length: int, steps: int) -> list[tuple[int, int]]:
    """Follow the ramp's definition step by step: (sequences, sequences before) of each step."""
    rows, position = [], 0
    for _ in range(steps):
        sequences = batch.sequences
        if batch.ramp is not None:
            increases = (
                batch.sequences - batch.ramp.start_sequences
            ) // batch.ramp.increment_sequences
            done = min(increases, position * length * increases // batch.ramp.over_tokens)
            sequences = batch.ramp.start_sequences + done * batch.ramp.increment_sequences
        rows.append((sequences, position))
        position += sequences
    return rows


def test_without_ramp() -> None:
    plan = BatchPlan(BatchConfig(sequences=6, micro_batch_sequences=2), 10)
    assert [plan.sequences(step) for step in (1, 2, 1000)] == [6, 6, 6]
    assert [plan.tokens_before(step) for step in (1, 2, 1000)] == [0, 60, 59_940]
    assert [plan.steps_for_tokens(tokens) for tokens in (0, 1, 60, 61)] == [0, 1, 1, 2]


def test_ramp_by_hand() -> None:
    # 2 -> 4 -> 6 sequences of 5 tokens over 100 tokens: full from sequence 20 on, halfway at 10.
    plan = BatchPlan(ramped(2, 2, 6, 100), 5)
    sequences = [plan.sequences(step) for step in range(1, 12)]
    assert sequences == [2, 2, 2, 2, 2, 4, 4, 4, 6, 6, 6]
    assert plan.tokens_before(9) == 5 * (5 * 2 + 3 * 4)


def test_stages_that_a_step_jumps_over_are_not_in_the_plan() -> None:
    # 8 sequences of one token increase the batch to 16 in one step: stages of 9 to 15 would end at
    # 8.
    plan = BatchPlan(ramped(8, 1, 16, 8), 1)
    stages = [(stage.first_step, stage.first_sequence, stage.sequences) for stage in plan.stages]
    assert stages == [(1, 0, 8), (2, 8, 16)]


def test_every_ramp_is_what_its_definition_says_step_by_step() -> None:
    draw = random.Random(0)
    jumped = 0
    for _ in range(300):
        increment, increases = draw.randint(1, 4), draw.randint(1, 6)
        start, length = draw.randint(1, 9), draw.randint(1, 7)
        full = start + increment * increases
        batch = ramped(start, increment, full, draw.randint(1, 60 * full))
        plan = BatchPlan(batch, length)
        jumped += len(plan.stages) < increases + 1
        rows = walk(batch, length, 90)
        assert [(plan.sequences(s), plan.sequences_before(s)) for s in range(1, 91)] == rows
        for tokens in range(0, rows[-1][1] * length, max(1, rows[-1][1] * length // 40)):
            steps = plan.steps_for_tokens(tokens)
            assert plan.tokens_after(steps) >= tokens
            assert steps == 0 or plan.tokens_after(steps - 1) < tokens
    assert jumped > 10  # some cases have stages that a single step skips


def test_length_and_warmup_in_tokens_become_steps() -> None:
    plan = BatchPlan(ramped(2, 2, 6, 100), 5)
    assert total_steps(TrainingConfig(total_steps=7), plan) == 7
    assert total_steps(TrainingConfig(total_tokens=110), plan) == 8
    assert total_steps(TrainingConfig(total_tokens=111), plan) == 9
    assert warmup_steps(ConstantSchedule(warmup_tokens=50), plan) == 5
    assert warmup_steps(ConstantSchedule(warmup_steps=3), plan) == 3
    assert warmup_steps(ConstantSchedule(), plan) == 0


def test_batch_that_ranks_cannot_divide() -> None:
    check_batch(BatchConfig(sequences=12, micro_batch_sequences=3), 4)
    with pytest.raises(UserError) as caught:
        check_batch(BatchConfig(sequences=10, micro_batch_sequences=1), 4)
    assert str(caught.value) == (
        "batch.sequences=10 cannot be divided by hdp=4 x batch.micro_batch_sequences=1; "
        "use batch.sequences=8 or 12"
    )
    with pytest.raises(
        UserError, match=r"use batch\.micro_batch_sequences=1, or batch\.sequences=8$"
    ):
        check_batch(BatchConfig(sequences=4, micro_batch_sequences=2), 4)


def test_ramp_stage_that_ranks_cannot_divide() -> None:
    check_batch(ramped(4, 8, 12, 100), 4)
    with pytest.raises(UserError, match=r"batch.ramp.start_sequences=6 .*; use 4 or 8"):
        check_batch(ramped(6, 2, 12, 100), 4)
    with pytest.raises(UserError, match=r"batch.ramp.increment_sequences=2 .*; use 4"):
        check_batch(ramped(4, 2, 12, 100), 4)
