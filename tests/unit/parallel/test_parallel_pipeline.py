"""Our changes to torch's schedules."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from allometry.parallel.pipeline import SCHEDULES, _gather_first_and_reduce_last
from allometry.scaling.layout import ONE_STAGE_SCHEDULES, V_SCHEDULES


def made(schedule: str, rank: int, per_rank: int, count: int, pp: int = 2) -> Any:
    """Return torch's schedule on stages without computation."""
    last = pp * per_rank - 1
    numbers = [rank, last - rank] if schedule in V_SCHEDULES else range(rank, last + 1, pp)
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=last + 1,
            group_size=pp,
            group_rank=rank,
            is_first=number == 0,
            is_last=number == last,
            submod=None,
        )
        for number in numbers
    ]
    return SCHEDULES[schedule](stages, count, scale_grads=False)


FORMS = [
    (schedule, per_rank)
    for schedule in sorted(set(SCHEDULES) - set(ONE_STAGE_SCHEDULES))
    for per_rank in ((2,) if schedule in V_SCHEDULES else (2, 5))
]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("schedule", "per_rank"), FORMS)
def test_stages_are_gathered_first_and_reduced_last(
    schedule: str, per_rank: int, rank: int
) -> None:
    """Also when torch alternates their gathers, as with more than three stages."""
    changed = made(schedule, rank, per_rank, 8)
    before = list(changed.pipeline_order_with_comms[rank])
    _gather_first_and_reduce_last(changed)
    after = changed.pipeline_order_with_comms[rank]
    moved = ("UNSHARD", "REDUCE_GRAD", "RESHARD")
    others = [action for action in before if action.computation_type.name not in moved]
    first, inner = after[:per_rank], after[per_rank : per_rank + len(others)]
    reduced = after[per_rank + len(others) : -per_rank]
    assert inner == others
    for kind, actions in zip(moved, (first, reduced, after[-per_rank:]), strict=True):
        assert [action.computation_type.name for action in actions] == [kind] * per_rank
        assert [action.stage_index for action in actions] == sorted(
            stage.stage_index for stage in changed._stages
        )
    # Torch reduces one stage while another still has passes to run.
    kinds = [action.computation_type.name for action in before]
    passes = [i for i, action in enumerate(before) if action.is_compute_op]
    assert kinds.index("REDUCE_GRAD") < passes[-1]


def test_schedules_of_one_stage_reduce_at_their_end_already() -> None:
    schedule = SimpleNamespace(_stage="one")
    _gather_first_and_reduce_last(schedule)
    assert vars(schedule) == {"_stage": "one"}, "there is no list of actions to change"
