"""Each term of the cost model at its limits: nothing when off, and never the wrong way."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.execution import SCHEDULES
from allometry.configs.machine import load_hardware
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


def terms(**columns: Any) -> dict[str, float]:
    found = step_time(Cases.of([PLAIN | columns], {"h100": H100}))
    return {name: float(column[0]) for name, column in found.terms.items()}


def seconds(**columns: Any) -> float:
    return sum(terms(**columns).values())


def replayed(schedule: str, pp: int, chunks: int, count: int) -> float:
    """Seconds beyond its work that a rank of equal stages takes, each micro-batch 1 a rank."""
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
    """Without overlap: bytes over one rate, for M micro-batches (parallel/zero.py)."""
    count = 256 // 16
    zero, one, two, three = (
        terms(overlap=0, zero=stage, reduces=reduces)["data parallel"]
        for stage, reduces in ((0, 0), (1, 0), (2, 1), (3, 1))
    )
    assert Constants().shard_bytes == 6
    assert one / zero == pytest.approx(6 / 8)
    assert two / zero == pytest.approx((2 + 4 * count) / 8)
    assert three / zero == pytest.approx((4 + 4) * count / 8)
    # In a pipeline once, as stage 1.
    assert terms(zero=2, pp=2, dp=8)["data parallel"] == terms(zero=1, pp=2, dp=8)["data parallel"]


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
        ({"document_stretch": 0}, "document_stretch=0 must be a number of at least 0.01"),
    ],
)
def test_impossible_columns_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Cases.of([PLAIN | change], {"h100": H100})
