"""Each term of the cost model at its limits: zero when disabled, and monotonic."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.execution import SCHEDULES
from allometry.configs.machine import HardwareConfig, load_hardware
from allometry.parallel.hdp import replay as replaying
from allometry.parallel.hdp.orders import schedule_orders
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import ONE_STAGE_SCHEDULES
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import step_time
from allometry.scaling.planner.pipeline import bubble

H100 = load_hardware("h100")
PLAIN: dict[str, Any] = {
    **{"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336},
    **{"vocab": 128256, "sequence": 4096, "micro_batch": 1, "global_batch": 256, "dp": 16},
    "hardware": "h100",
}
EXPERTS = PLAIN | {"experts": 64, "top_k": 6, "expert_ffn": 1408, "ep": 16}


SWIFT = H100.model_copy(
    update={
        name: getattr(H100, name).model_copy(update={"latency_s": 1e-15})
        for name in ("inside", "across")
    }
)


def terms(card: HardwareConfig = H100, /, **columns: Any) -> dict[str, float]:
    found = step_time(Cases.of([PLAIN | columns], {"h100": card}))
    return {name: float(column[0]) for name, column in found.terms.items()}


def seconds(**columns: Any) -> float:
    return sum(terms(**columns).values())


def replayed(schedule: str, pp: int, chunks: int, count: int) -> float:
    """Return the idle seconds of a rank with equal stages, each micro-batch 1 s per rank."""
    units = tuple(Unit((number,), (0,), float(pp)) for number in range(count))
    plan = Plan([8] * count, 1, "free", units, (tuple(range(count)),), capacity=8)
    orders = partial(schedule_orders, schedule, pp, chunks)
    return replaying.replay(plan, orders).makespan - count


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shares", [(1, 1, 1), (2, 3, 2), (3, 4, 2)])
def test_bubbles_are_those_of_the_orders_that_ranks_run(
    schedule: str, shares: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    f, b, w = (share / sum(shares) for share in shares)
    monkeypatch.setattr(replaying, "SHARES", {"F": f, "B": b + w, "I": b, "W": w})
    for pp in (2, 4, 8):
        for chunks in (1,) if schedule in ONE_STAGE_SCHEDULES else (2, 3):
            if chunks == 3 and schedule in ("zbv_zero_bubble", "dualpipe_v"):
                continue
            found = float(bubble(schedule, pp, chunks, f, b, w))
            truth = replayed(schedule, pp, chunks, 4 * pp)
            if schedule == "dualpipe_v" and b > f:
                assert found <= truth + 1e-9
                assert truth < 1.5 * found
            else:
                assert found == pytest.approx(truth, abs=1e-9), (pp, chunks)


@pytest.mark.parametrize(
    ("off", "on", "term"),
    [
        ({}, {"states_host": 1.0}, "states on the host"),
        ({}, {"states_disk": 0.5}, "states on the host"),
        ({}, {"host_update": 1}, "states on the host"),
        ({}, {"activations_host": 0.5, "kept_bytes": 1e6}, "activations on the host"),
        ({"quantize_bytes": 6}, {"precision": "fp8", "quantize_bytes": 6}, "FP8 casts"),
        ({}, {"saved_fp8": 1}, "activations in FP8"),
        ({}, {"document_stretch": 1.2}, "uneven documents"),
    ],
)
def test_a_term_is_nothing_when_off(off: dict[str, Any], on: dict[str, Any], term: str) -> None:
    assert terms(**off)[term] == 0
    assert terms(**on)[term] > 0


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("states_host", (0, 0.25, 1)),
        ("states_disk", (0, 0.25, 1)),
        ("document_stretch", (1, 1.1, 2)),
        ("repeats", (0, 0.5, 1)),
        ("gather_bytes", (1, 2, 4)),
        ("reduce_bytes", (2, 4)),
        ("attended", (64, 1024, 4096)),
        ("saved_fp8", (0, 1)),
        ("state_bytes", (2.08, 8)),
        ("quantize_bytes", (0, 3, 6)),
    ],
)
def test_more_of_it_is_slower(column: str, values: tuple[float, ...]) -> None:
    precise = {"precision": "fp8"} if column == "quantize_bytes" else {}
    apart = {"overlap": 0} | precise
    found = [seconds(**{column: value}, **apart) for value in values]
    assert (np.diff(found) > 0).all(), found


def test_fp8_products_of_fewer_layers_gain_less() -> None:
    found = [seconds(precision="fp8", narrow_share=share) for share in (1.0, 0.5, 0.0)]
    assert found[0] < found[1] < found[2] == pytest.approx(seconds())


def test_activations_that_computing_hides_cost_nothing() -> None:
    on = {"activations_host": 1.0}
    assert terms(kept_bytes=100.0, **on)["activations on the host"] == 0
    found = [terms(kept_bytes=size, **on)["activations on the host"] for size in (1e5, 1e6, 1e7)]
    assert 0 < found[0] < found[1] < found[2]


def test_stages_of_zero_send_what_their_table_says() -> None:
    """Without overlap and latencies: bytes over a rate, for M micro-batches (parallel/zero.py)."""
    count = 256 // 16
    zero, one, two, three = (
        terms(SWIFT, overlap=0, zero=stage, reduces=reduces)["data parallel"]
        for stage, reduces in ((0, 0), (1, 0), (2, 1), (3, 1))
    )
    assert Constants().shard_bytes == 6
    assert one / zero == pytest.approx(6 / 8)
    assert two / zero == pytest.approx((2 + 4 * count) / 8)
    assert three / zero == pytest.approx((4 + 4) * count / 8)
    # In a pipeline once, as in stage 1.
    assert terms(zero=2, pp=2, dp=8)["data parallel"] == terms(zero=1, pp=2, dp=8)["data parallel"]


def test_messages_of_gradients_take_the_steps_of_their_ring() -> None:
    """Latency grows linearly with the ranks of a ring, and logarithmically with those of a tree."""

    def added(stage: int, dp: int, pp: int = 1) -> float:
        layout = {"zero": stage, "dp": dp, "pp": pp, "overlap": 0, "global_batch": 4096}
        slow, swift = (terms(card, **layout)["data parallel"] for card in (H100, SWIFT))
        return slow - swift

    assert added(1, 1) == 0
    assert added(1, 1024) / added(1, 64) == pytest.approx(16, rel=0.01)
    assert added(1, 1024) / added(1, 1024, pp=4) == pytest.approx(4)
    assert added(0, 8) == pytest.approx(added(1, 8))  # within a node a ring equals a chain
    assert 1 < added(0, 1024) / added(0, 64) < 2
    # Each micro-batch of stage 3 gathers twice and scatters once; stage 1 does each once a step.
    assert added(3, 64) / added(1, 64) == pytest.approx(4096 / 64 * 3 / 2)


def test_copies_of_shards_send_less_across_nodes() -> None:
    sharded, copied = (
        terms(zero=3, dp=64, replicas=copies, overlap=0, global_batch=4096)["data parallel"]
        for copies in (1, 8)
    )
    assert copied < sharded
    whole = terms(zero=1, dp=16, replicas=16, overlap=0)["data parallel"]
    assert whole == pytest.approx(terms(zero=0, dp=16, overlap=0)["data parallel"])


def test_chunks_hide_tensor_parallelisms_messages_but_for_the_first() -> None:
    found = [terms(tp=8, dp=2, tensor_chunks=chunks)["tensor parallel"] for chunks in (1, 4, 8)]
    assert found[0] > found[1] > found[2] > 0
    assert terms(tensor_chunks=4)["tensor parallel"] == 0


def test_a_row_for_each_expert_costs_more_across_nodes_alone() -> None:
    far = [terms(**EXPERTS | {"deduplicated": way})["expert parallel"] for way in (1, 0)]
    near = [terms(**EXPERTS | {"ep": 8, "deduplicated": way})["expert parallel"] for way in (1, 0)]
    assert far[0] < far[1]
    assert near[0] == near[1]


def test_an_exchange_beside_computation_costs_what_that_does_not_hide() -> None:
    far = EXPERTS | {"dp": 64, "ep": 64}
    whole, beside = (terms(**far, experts_beside=x)["expert parallel"] for x in (0, 1))
    few = terms(**far, nodes_of_token=2)["expert parallel"]
    assert 0 <= beside < whole
    assert few < whole
    assert terms(**far, nodes_of_token=8)["expert parallel"] == whole


def test_experts_one_by_one_cost_launches() -> None:
    found = [
        terms(**EXPERTS | {"ep": ep, "grouped": grouped})["waiting for the host"]
        for ep, grouped in ((16, 1), (16, 0), (1, 0))
    ]
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"states_host": 1.5}, "states_host=1.5 must be a share, at most 1"),
        ({"states_host": 0.6, "states_disk": 0.6}, "together more than all states; lower one"),
        ({"experts_beside": 2}, "experts_beside=2 must be a share, at most 1"),
        ({"document_stretch": 0}, "document_stretch=0 must be a number of at least 0.01"),
    ],
)
def test_impossible_columns_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Cases.of([PLAIN | change], {"h100": H100})
