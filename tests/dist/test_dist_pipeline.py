"""Pipelines give one process's gradients and losses: every schedule, with ZeRO and tied heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import pipelined
import tiny
from allometry.configs.execution import SCHEDULES
from allometry.configs.run import RunConfig
from allometry.parallel.apply import Parallel
from thinned import thinned

RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_equal_one_process(
    run_ranks: RunRanks, schedule: str, dtype: str, tolerance: float
) -> None:
    results = run_ranks(pipelined.errors, 2, pipelined.config(2, schedule, dtype), 4)
    last = 0 if schedule in ("zbv_zero_bubble", "dualpipe_v") else 1
    pipelined.assert_equal_to_one_process(results, last, 4, tolerance)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_ranks_equal_one_process(run_ranks: RunRanks, schedule: str) -> None:
    results = run_ranks(pipelined.errors, 4, pipelined.config(4, schedule), 8)
    last = 0 if schedule in ("zbv_zero_bubble", "dualpipe_v") else 3
    pipelined.assert_equal_to_one_process(results, last, 8, 1e-10)


@pytest.mark.parametrize(
    ("schedule", "split"),
    [("1f1b", (1, 4)), ("interleaved_1f1b", (1, 2, 1, 1)), ("zbv_zero_bubble", (2, 1, 1, 1))],
)
def test_uneven_stages(run_ranks: RunRanks, schedule: str, split: tuple[int, ...]) -> None:
    run = pipelined.config(2, schedule, layers=5, split=split)
    results = run_ranks(pipelined.errors, 2, run, 4)
    pipelined.assert_equal_to_one_process(
        results, 0 if schedule == "zbv_zero_bubble" else 1, 4, 1e-10
    )


@pytest.mark.parametrize(
    ("schedule", "zero"),
    thinned(
        {
            ("1f1b", "0"),
            ("1f1b", "2"),
            ("interleaved_1f1b", "1"),
            ("interleaved_1f1b", "3-untied"),
            ("interleaved_zero_bubble", "0"),
            ("interleaved_zero_bubble", "3"),
            ("zbv_zero_bubble", "1"),
            ("zbv_zero_bubble", "3"),
        },
        ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"),
        ("0", "1", "2", "3", "3-untied"),
    ),
)
def test_with_zero_equals_one_process(run_ranks: RunRanks, schedule: str, zero: str) -> None:
    stage, *untied = zero.split("-")
    run = pipelined.config(2, schedule, layers=5, tied=not untied, zero=int(stage))
    results = run_ranks(pipelined.errors, 4, run, 4)
    last = 0 if schedule == "zbv_zero_bubble" else 1
    pipelined.assert_equal_to_one_process(results, last, 4, 1e-10)


@pytest.mark.parametrize("schedule", ["gpipe", "looped_bfs", "dualpipe_v"])
def test_with_zero_3_the_other_schedules_equal_one_process(
    run_ranks: RunRanks, schedule: str
) -> None:
    results = run_ranks(
        pipelined.errors, 4, pipelined.config(2, schedule, layers=5, tied=True, zero=3), 4
    )
    pipelined.assert_equal_to_one_process(results, 0 if schedule == "dualpipe_v" else 1, 4, 1e-10)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"])
def test_with_tensor_parallelism_equals_one_process(run_ranks: RunRanks, schedule: str) -> None:
    run = pipelined.config(2, schedule, layers=4, tied=True, tp=2)
    results = run_ranks(pipelined.errors, 4, run, 4)
    last = 0 if schedule == "zbv_zero_bubble" else 1
    pipelined.assert_equal_to_one_process(results, last, 4, 1e-10)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv_zero_bubble"])
def test_with_offload_equals_one_process(run_ranks: RunRanks, schedule: str) -> None:
    run = pipelined.config(2, schedule, layers=4, tied=True, zero=3, offload="cpu")
    results = run_ranks(pipelined.errors, 4, run, 4)
    last = 0 if schedule == "zbv_zero_bubble" else 1
    pipelined.assert_equal_to_one_process(results, last, 4, 1e-10)


def average_over_micro_batches(made: Parallel) -> None:
    """Average over micro-batches, as torch's schedules do by default."""
    execution: Any = made.execution
    make = execution._make_schedule

    def averaging(*args: Any) -> Any:
        schedule = make(*args)
        schedule.scale_grads = True
        return schedule

    execution._make_schedule = averaging


def forget_value(made: Parallel) -> None:
    execution: Any = made.execution
    execution._tied.send_value = lambda: None


def forget_gradient(made: Parallel) -> None:
    execution: Any = made.execution
    execution._tied.return_gradient = lambda: None


MISTAKES = {f.__name__: f for f in (average_over_micro_batches, forget_value, forget_gradient)}


def mistaken_errors(run: RunConfig, mistake: str, shift: bool) -> float:
    with tiny.mesh(run) as mesh:
        made = tiny.parallel(run, mesh)
        if shift:  # the mirror starts out equal: simulate an optimizer update of the owner
            for name, parameter in made.named_parameters():
                if name == "embedding.weight":
                    parameter.data.mul_(1.5)
        if mistake:
            MISTAKES[mistake](made)
        gradients, _, _ = pipelined.step(made, run, mesh, 4)
        alone = tiny.initialized(run, mesh.device)
        if shift:
            alone.embedding.weight.data.mul_(1.5)
        batches = tiny.micro_batches(4 * mesh.hdp.size)
        tiny.backward_alone(alone, batches)
        expected = tiny.gradients(alone)
        return tiny.worst_error(gradients, {name: expected[name] for name in gradients})


@pytest.mark.parametrize(
    ("mistake", "schedule", "zero"),
    [
        ("average_over_micro_batches", "1f1b", 0),
        ("average_over_micro_batches", "zbv_zero_bubble", 3),
        ("forget_value", "1f1b", 1),
        ("forget_value", "zbv_zero_bubble", 0),
        ("forget_gradient", "interleaved_1f1b", 3),
        ("forget_gradient", "zbv_zero_bubble", 0),
    ],
)
def test_the_comparison_sees_mistakes(
    run_ranks: RunRanks, mistake: str, schedule: str, zero: int
) -> None:
    run = pipelined.config(2, schedule, layers=4, tied=True, zero=zero)
    ranks = 4 if zero else 2
    assert max(run_ranks(mistaken_errors, ranks, run, mistake, True)) > 0.05
    assert max(run_ranks(mistaken_errors, ranks, run, "", True)) < 1e-10
