"""Pipeline schedules as lists of actions for each rank, for any number of micro-batches.

A plan is replayed with these lists before it runs (``replay.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]
"""Forward pass; backward pass; its halves: gradients of activations (I) and of weights (W)."""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Kind
    stage: int
    micro_batch: int


Orders = tuple[tuple[Action, ...], ...]
"""Actions of each pipeline rank in order."""


def ring_pass(action: Action) -> str | None:
    """Return the ring pass that ``action`` takes part in: forward (F), backward (G) or None.

    A full backward on one rank matches the first half of a split backward on another rank, since
    pipelines with other numbers of micro-batches split different backwards. In the first stage,
    which sends no gradient, torch leaves the complete backward to the second half. For example,
    ``ring_pass(Action("F", 0, 1))`` is "F".
    """
    if action.kind == "F":
        return "F"
    whole = action.kind == "B"
    return "G" if whole or (action.kind == "I") == (action.stage > 0) else None


def schedule_orders(schedule: str, pp: int, stages_per_rank: int, count: int) -> Orders:
    """Return the actions of torch's ``schedule`` for ``count`` micro-batches on ``pp`` ranks.

    ``schedule`` is a value of ``parallel.pipeline``. Unsupported numbers of micro-batches raise
    ValueError or AssertionError, as in torch. For example, ``schedule_orders("1f1b", 2, 1, 2)``
    starts rank 0 with two forward passes and rank 1 with one.
    """
    assert pp >= 1, pp
    assert count >= 1, count
    if schedule == "gpipe":
        assert stages_per_rank == 1, stages_per_rank
        return tuple(_gpipe(rank, count) for rank in range(pp))
    if schedule == "1f1b":
        assert stages_per_rank == 1, stages_per_rank
        return tuple(_one_forward_one_backward(rank, pp, count) for rank in range(pp))
    if schedule == "looped_bfs":
        return tuple(_breadth_first(range(r, pp * stages_per_rank, pp), count) for r in range(pp))
    return _torch_orders(schedule, pp, stages_per_rank, count)


def _gpipe(stage: int, count: int) -> tuple[Action, ...]:
    """Order all forward passes, then all backward passes (arXiv 1811.06965)."""
    return tuple(Action(kind, stage, index) for kind in ("F", "B") for index in range(count))


def _one_forward_one_backward(stage: int, pp: int, count: int) -> tuple[Action, ...]:
    """Order one forward pass for each later stage, then alternate forward and backward passes."""
    ahead = min(pp - 1 - stage, count)
    actions = [Action("F", stage, index) for index in range(ahead)]
    for index in range(count):
        if index + ahead < count:
            actions.append(Action("F", stage, index + ahead))
        actions.append(Action("B", stage, index))
    return tuple(actions)


def _breadth_first(stages: Sequence[int], count: int) -> tuple[Action, ...]:
    """Order all micro-batches through a stage before the next stage (arXiv 2211.05953)."""
    forward = [Action("F", stage, index) for stage in stages for index in range(count)]
    return (
        *forward,
        *(Action("B", a.stage, a.micro_batch) for a in reversed(forward)),
    )


def _torch_orders(schedule: str, pp: int, stages_per_rank: int, count: int) -> Orders:
    """Read ``pipeline_order`` of one of torch's schedules, built with stages that compute nothing.

    The attribute is private: torch 2.11 to 2.13 fill it in the constructor, for all ranks.
    """
    from torch.distributed import pipelining

    kinds: dict[str, Any] = {
        "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
        "interleaved_zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
        "zbv_zero_bubble": pipelining.ScheduleZBVZeroBubble,
        "dualpipe_v": pipelining.ScheduleDualPipeV,
    }
    stages = [
        SimpleNamespace(
            num_stages=pp * stages_per_rank,
            stage_index=number * pp,
            group_size=pp,
            group_rank=0,
            is_first=number == 0,
            is_last=False,
            submod=None,
        )
        for number in range(stages_per_rank)
    ]
    by_rank = kinds[schedule](stages, count).pipeline_order
    return tuple(
        tuple(action for entry in by_rank[rank] for action in _actions(entry)) for rank in range(pp)
    )


def _actions(entry: Any) -> list[Action]:
    """Return the passes of one of torch's entries, which may be empty or an overlapped pair."""
    if entry is None:
        return []
    if entry.sub_actions is not None:
        return [action for part in entry.sub_actions for action in _actions(part)]
    kind = entry.computation_type.value
    return [Action(kind, entry.stage_index, entry.microbatch_index)] if kind in "FBIW" else []
