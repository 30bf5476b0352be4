"""The order of passes of each schedule, compared with torch's."""

from collections import Counter
from types import SimpleNamespace

import pytest
from torch.distributed import pipelining

from allometry.configs.execution import SCHEDULES
from allometry.parallel.hdp.orders import Action, Orders, schedule_orders
from allometry.scaling.layout import ONE_STAGE_SCHEDULES, V_SCHEDULES


class Recorder:
    """Stage that records a schedule's calls, without computing or sending."""

    def __init__(self, stage: int, stages: int) -> None:
        self.stage_index, self.num_stages = stage, stages
        self.has_backward = self.is_first = self.is_last = False
        self.done: list[tuple[str, int, int]] = []

    def forward_one_chunk(self, index: int, *given: object, **named: object) -> None:
        self.done.append(("F", self.stage_index, index))

    def backward_one_chunk(self, index: int, **named: object) -> None:
        self.done.append(("B", self.stage_index, index))

    def perform_reduce_grad(self, scale: int) -> None:
        pass

    def no_messages(self, index: int) -> list[object]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_messages


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "count"), [(2, 2), (2, 5), (4, 4), (4, 9), (3, 7)])
def test_ours_is_what_torch_does(
    monkeypatch: pytest.MonkeyPatch, schedule: str, pp: int, count: int
) -> None:
    """Recorded at run time: 2.13's list of 1F1B numbers the last rank's forward passes from 1."""
    kind = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}[schedule]
    monkeypatch.setattr(kind, "_initialize_stage", lambda *given: None)
    for rank, actions in enumerate(schedule_orders(schedule, pp, 1, count)):
        stage = Recorder(rank, pp)
        runs = kind(stage, count, loss_fn=lambda output, target: output)
        runs._step_microbatches([()] * count, [{}] * count)
        assert [tuple(action) for action in actions] == stage.done


@pytest.mark.parametrize(("pp", "count"), [(2, 1), (2, 5), (4, 9)])
def test_breadth_first_is_torchs(pp: int, count: int) -> None:
    stages = [SimpleNamespace(num_stages=2 * pp, group_size=pp, group_rank=0)] * 2
    torchs = pipelining.ScheduleLoopedBFS(stages, count).pipeline_order
    ours = schedule_orders("looped_bfs", pp, 2, count)
    for rank, actions in enumerate(ours):
        assert list(actions) == [
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in torchs[rank]
            if action is not None
        ]


def test_fewer_micro_batches_than_ranks_in_1f1b() -> None:
    assert schedule_orders("1f1b", 3, 1, 1) == tuple(
        (Action("F", rank, 0), Action("B", rank, 0)) for rank in range(3)
    )


def each_pass_once(orders: Orders, stages: int, count: int) -> None:
    counts = Counter(action for rank in orders for action in rank)
    assert set(counts.values()) == {1}
    for stage in range(stages):
        for index in range(count):
            assert counts[Action("F", stage, index)] == 1
            whole = counts[Action("B", stage, index)]
            halves = [counts[Action("I", stage, index)], counts[Action("W", stage, index)]]
            # Torch never mixes I and B of one micro-batch; some schedules mix both kinds.
            assert (whole, *halves) in ((1, 0, 0), (0, 1, 1)), (stage, index)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rounds", [2, 5])
def test_each_pass_comes_once_and_on_its_rank(schedule: str, rounds: int) -> None:
    pp, each = 3, 1 if schedule in ONE_STAGE_SCHEDULES else 2
    orders = schedule_orders(schedule, pp, each, rounds * pp)
    each_pass_once(orders, pp * each, rounds * pp)
    for rank, actions in enumerate(orders):
        last = pp * each - 1 - rank if schedule in V_SCHEDULES else rank + (each - 1) * pp
        assert {action.stage for action in actions} == {rank, last}


def test_numbers_that_a_schedule_cannot_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the number of rounds"):
        schedule_orders("interleaved_1f1b", 2, 2, 7)
    with pytest.raises(ValueError, match="at least as many microbatches"):
        schedule_orders("dualpipe_v", 2, 2, 2)
