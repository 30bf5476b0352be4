"""Reductions begin within a stage's last backward, and not earlier, in every schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp

import pipelined
import tiny
from allometry.parallel import reduce
from allometry.parallel.reduce import FlatReducer
from allometry.parallel.stage import Stage

RunRanks = Callable[..., list[Any]]
COUNT = 4


def events(schedule: str, zero: int, counted: bool) -> tuple[list[str], float]:
    """(On each rank) start and end of backwards by stage, and reductions; and the error.

    "B0" and "b0": a weight-gradient backward of stage 0 starts and ends; "r": a bucket or a block
    is reduced.
    """
    run = pipelined.config(2, schedule, zero=zero)
    seen: list[str] = []

    def noted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append("r")
            return original(*args, **kwargs)

        return call

    def backward(original: Callable[..., Any], weights: Callable[..., bool]) -> Callable[..., Any]:
        def call(stage: Any, *args: Any, **kwargs: Any) -> Any:
            if weights(*args, **kwargs):
                seen.append(f"B{stage.stage_index}")
            made = original(stage, *args, **kwargs)
            if weights(*args, **kwargs):
                seen.append(f"b{stage.stage_index}")
            return made

        return call

    with tiny.mesh(run) as mesh, ExitStack() as stack:
        made = tiny.parallel(run, mesh)
        if isinstance(made.sync, FlatReducer):
            made.sync._overlap, made.sync._bucket_bytes = True, 4096
        for owner, name, changed in (
            (reduce._Bucket, "launch", noted(reduce._Bucket.launch)),
            (fsdp, "foreach_reduce", noted(fsdp.foreach_reduce)),
            (
                Stage,
                "backward_one_chunk",
                backward(
                    Stage.backward_one_chunk,
                    lambda *_, full_backward=True, **__: bool(full_backward),
                ),
            ),
            (
                Stage,
                "backward_weight_one_chunk",
                backward(Stage.backward_weight_one_chunk, lambda *_, **__: True),
            ),
        ):
            stack.enter_context(mock.patch.object(owner, name, changed))
        if not counted:
            stack.enter_context(
                mock.patch.object(Stage, "_gradients_of_weights", return_value=nullcontext())
            )
        return seen, pipelined.check(made, run, mesh, COUNT)["error"]


def inside(seen: list[str], stage: str) -> int:
    """Count the reductions between start and end of the stage's last backward."""
    begin = len(seen) - 1 - seen[::-1].index(f"B{stage}")
    end = len(seen) - 1 - seen[::-1].index(f"b{stage}")
    assert begin < end
    return seen[begin:end].count("r")


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_of_one_stage(run_ranks: RunRanks, zero: int) -> None:
    for rank, (seen, error) in enumerate(run_ranks(events, 4, "1f1b", zero, True)):
        stage = str(rank // 2)
        assert error < 1e-12
        assert seen.count("r") >= 4
        first = seen.index("r")
        assert seen[:first].count(f"B{stage}") == COUNT, "not before the last backward"
        assert inside(seen, stage) >= seen.count("r") - 2, seen


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble"])
def test_of_several_stages(run_ranks: RunRanks, schedule: str) -> None:
    for rank, (seen, error) in enumerate(run_ranks(events, 4, schedule, 0, True)):
        low, high = str(rank // 2), str(rank // 2 + 2)
        assert error < 1e-12
        # The later stage ends first; its buckets are reduced while the earlier one still computes.
        last_low = len(seen) - 1 - seen[::-1].index(f"B{low}")
        assert "r" in seen[:last_low], seen
        first = seen.index("r")
        assert seen[:first].count(f"B{high}") == COUNT, seen


@pytest.mark.parametrize("zero", [0, 1])
def test_without_counting_nothing_is_reduced_before_the_end(run_ranks: RunRanks, zero: int) -> None:
    for rank, (seen, error) in enumerate(run_ranks(events, 4, "1f1b", zero, False)):
        assert error < 1e-12
        assert inside(seen, str(rank // 2)) == 0
