"""Plans: every token once, capacity, agreement, balance."""

import json
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig, ContextCosts
from allometry.configs.model import DenseModel
from allometry.parallel.hdp.replay import replay, summary
from allometry.scaling.hdp.balanced_lockstep import Waves
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Mode, Plan, make_plan, member_tokens
from allometry.scaling.hdp.policies import POLICIES
from allometry.scaling.hdp.problem import Draft

MODEL = DenseModel(
    vocab_size=32000, width=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_width=11008
)
COST = CostModel.of(MODEL, ContextCosts())
MODES: tuple[Mode, ...] = get_args(Mode)
LAYERS = 8


def context(policy: str = "balanced", **fields: Any) -> ContextConfig:
    return ContextConfig.model_validate({"policy": policy, **fields})


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Draw documents that fit, on up to 12 ranks of up to 40 tokens."""
    policy = draw(st.sampled_from(sorted(POLICIES)))
    ranks = draw(st.integers(1, 12))
    multiple = draw(st.sampled_from([1, 2, 4]))
    capacity = draw(st.integers(multiple, 40))
    degree = 1
    if policy == "static":
        degree = draw(st.sampled_from([d for d in range(1, ranks + 1) if ranks % d == 0]))
    longest = (degree if policy == "static" else ranks) * (capacity // multiple * multiple)
    lengths = draw(st.lists(st.integers(1, longest), min_size=1, max_size=40))
    offload = draw(st.sampled_from(["none", "selective"])) if policy != "static" else "none"
    costs = {
        "bandwidth_gb_per_s": draw(st.sampled_from([0.01, 50.0, 1e6])),
        "host_bandwidth_gb_per_s": draw(st.sampled_from([1.0, 1e3, 1e6])),
        "micro_batch_ms": draw(st.sampled_from([0.0, 0.01])),
    }
    pp = draw(st.integers(1, 3))
    return {
        "lengths": lengths,
        "ranks": ranks,
        "context": context(
            policy,
            degree=degree,
            capacity_tokens=capacity,
            min_chunk_tokens=draw(st.sampled_from([1, 4])),
            offload=offload,
            costs=costs,
        ),
        "cost": CostModel.of(MODEL, ContextCosts(**costs)),
        "mode": draw(st.sampled_from(MODES)),
        "layers": LAYERS,
        "multiple": multiple,
        "round_count": draw(st.sampled_from([1, pp])),
        "least": draw(st.sampled_from([1, pp])),
        "pp": pp,
    }


def held(plan: Plan, rank: int) -> list[tuple[int, int]]:
    """Return all (document, position) that a rank computes, divided with numpy alone."""
    places = []
    for unit in plan.of_rank(rank):
        if unit is None:
            continue
        n, member = len(unit.ring), unit.ring.index(rank)
        for document in unit.documents:
            chunks = np.array_split(np.arange(plan.lengths[document]), 2 * n)
            mine = np.concatenate([chunks[member], chunks[2 * n - 1 - member]])
            places += [(document, place) for place in mine.tolist()]
    return places


@settings(max_examples=200)
@given(problems())
def test_every_plan_holds(problem: dict[str, Any]) -> None:
    check_plan(problem)


@pytest.mark.slow
@settings(max_examples=1000)
@given(problems())
def test_every_plan_of_a_thousand_holds(problem: dict[str, Any]) -> None:
    check_plan(problem)


def check_plan(problem: dict[str, Any]) -> None:
    plan = make_plan(**problem)
    lengths, settings_ = problem["lengths"], problem["context"]
    tokens = [token for rank in range(plan.ranks) for token in held(plan, rank)]
    assert len(tokens) == len(set(tokens)) == sum(lengths)
    for number, unit in enumerate(plan.units):
        places = {
            rank: order.index(number) for rank, order in enumerate(plan.orders) if number in order
        }
        assert sorted(places) == sorted(unit.ring), "members agree"
        if plan.mode != "free":
            assert len(set(places.values())) == 1, "at one place"
        check_room(plan, number, settings_)
    counts = [len(order) for order in plan.orders]
    assert min(counts) >= 1
    if plan.mode != "free":
        assert all(count % problem["round_count"] == 0 for count in counts)
        assert min(counts) >= problem["least"]
    if plan.mode == "lockstep":
        assert len(set(counts)) == 1
    assert replay(plan).makespan > 0
    assert make_plan(**problem | {"lengths": np.array(lengths)}) == plan, "deterministic"


def check_room(plan: Plan, number: int, settings_: ContextConfig) -> None:
    """Check that no member exceeds its capacity, apart from offloaded layers."""
    unit = plan.units[number]
    lengths = [plan.lengths[document] for document in unit.documents]
    for member in range(len(unit.ring)):
        tokens = member_tokens(lengths, len(unit.ring), member)
        tokens = -(-tokens // plan.multiple) * plan.multiple
        if unit.offload == 0:
            assert tokens <= settings_.capacity_tokens
        else:
            assert settings_.offload == "selective"
            away = unit.offload * (LAYERS - 2)
            assert away == round(away), "whole layers"
            kept = 2 + (1 - unit.offload) * (LAYERS - 2)
            assert kept * tokens <= LAYERS * settings_.capacity_tokens * (1 + 1e-12)
            assert len(unit.documents) == 1
    if settings_.policy == "static":
        assert len(unit.ring) == settings_.degree
    elif len(unit.ring) > -(-sum(lengths) // plan_room(plan)):
        assert sum(lengths) / (2 * len(unit.ring)) >= settings_.min_chunk_tokens


def plan_room(plan: Plan) -> int:
    assert plan.capacity is not None
    return plan.capacity // plan.multiple * plan.multiple


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_static_gives_short_documents_as_many_ranks(degree: int) -> None:
    plan = make_plan([5, 3, 30, 1], 4, context("static", degree=degree, capacity_tokens=32), COST,
                     "free", layers=8)  # fmt: skip
    groups = [tuple(range(i, i + degree)) for i in range(0, 4, degree)]
    assert {unit.ring for unit in plan.units} <= set(groups)
    assert plan.describe()["degrees"] == {str(degree): 4}


def test_static_deals_the_costliest_first() -> None:
    lengths = [3, 30, 17, 24, 20, 29, 27, 19]
    plan = make_plan(lengths, 4, context("static", degree=2, capacity_tokens=16), COST,
                     "free", layers=8)  # fmt: skip
    costs = [[unit.cost for unit in plan.of_rank(rank) if unit] for rank in (0, 2)]
    assert costs == [sorted(each, reverse=True) for each in costs]
    assert sorted(unit.cost for unit in plan.units)[-2:] == sorted(each[0] for each in costs)


def test_the_costliest_single_unit_goes_beside_the_costliest_ring() -> None:
    waves = Waves(4)
    for cost in (2.0, 5.0):
        waves.add(Draft((0,), 3, cost, 0.0))
    waves.fill([Draft((1,), 1, 4.0, 0.0), Draft((2,), 1, 1.0, 0.0)])
    by_wave = [set(numbers) for numbers in zip(*waves.orders(), strict=True)]
    assert by_wave == [{0, 3}, {1, 2}], "4 beside 5, and 1 beside 2"


def test_naive_gives_as_few_ranks_as_fit() -> None:
    lengths = [100, 10, 33, 32, 64, 65, 5]
    plan = make_plan(lengths, 6, context("naive", capacity_tokens=32), COST, "free", layers=8)
    degrees = {document: len(unit.ring) for unit in plan.units for document in unit.documents}
    assert [degrees[i] for i in range(len(lengths))] == [-(-n // 32) for n in lengths]
    assert (1, 6) in {tuple(sorted(unit.documents)) for unit in plan.units}, "short ones together"


def test_balanced_gives_a_lonely_document_all_the_ranks_it_can_use() -> None:
    fast = CostModel.of(MODEL, ContextCosts(bandwidth_gb_per_s=1e9))
    few = make_plan([4096], 64, context(capacity_tokens=4096), fast, "free", layers=8)
    assert len(few.units[0].ring) == 16, "4096 / (2 x 128)"
    naive = make_plan([4096], 64, context("naive", capacity_tokens=4096), fast, "free", layers=8)
    assert replay(few).makespan < replay(naive).makespan / 15


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_cost_more_than_they_bring_are_left_out(mode: Mode) -> None:
    slow = CostModel.of(MODEL, ContextCosts(bandwidth_gb_per_s=1e-3))
    plan = make_plan([4096], 64, context(capacity_tokens=4096), slow, mode, layers=8)
    assert len(plan.units[0].ring) == 1


def lengths_of(documents: int, seed: int = 0, longest: int = 65536) -> np.ndarray:
    random = np.random.default_rng(seed)
    lengths = np.ceil(random.lognormal(7.2, 1.5, size=documents)).astype(np.int64)
    return np.minimum(lengths, longest)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_end_together(seed: int) -> None:
    """At least 16 micro-batches of work per rank, and no document above half a step."""
    lengths, ranks = lengths_of(3000, seed), 32
    plan = make_plan(lengths, ranks, context(), COST, "free", layers=32)
    tokens = lengths.astype(float)
    ideal = COST.compute(tokens, tokens * (tokens + 1)).sum() / ranks
    assert lengths.sum() >= 16 * 8192 * ranks
    assert max(unit.cost for unit in plan.units) <= 0.5 * ideal
    ends = [lane[-1].end for (lane,) in replay(plan).spans]
    assert max(ends) / np.mean(ends) <= 1.05
    assert max(ends) / ideal <= 1.05
    naive = make_plan(lengths, ranks, context("naive"), COST, "free", layers=32)
    assert replay(naive).makespan > 1.02 * max(ends), "the control is worse"


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_slow_rings_do_not_take_ranks_from_others(kv_heads: int) -> None:
    """With 32 key heads all hops are exposed; more ranks then take longer in total."""
    model = MODEL.model_copy(update={"num_kv_heads": kv_heads})
    cost = CostModel.of(model, ContextCosts())
    lengths = [262_144] * 6 + [50_000] * 8 + [3000] * 400
    plan, static = (
        make_plan(lengths, 128, config, cost, "free", layers=32)
        for config in (context(), context("static", degree=32))
    )
    assert replay(plan).makespan < 0.7 * replay(static).makespan
    assert replay(plan).makespan < 1.4 * bound(cost, lengths, 128)


def bound(cost: CostModel, lengths: list[int], ranks: int) -> float:
    """Return the longest document's best time, or the total at minimum cost,
    whichever is longer."""
    best, work = 0.0, 0.0
    for length in lengths:
        degrees = range(-(-length // 8192), min(ranks, max(length // 256, 1)) + 1)
        seconds = {n: cost.unit([length], n) for n in degrees} if length > 8192 else {
            1: cost.unit([length], 1)
        }  # fmt: skip
        best = max(best, min(seconds.values()))
        work += min(n * s for n, s in seconds.items())
    return max(best, work / ranks)


@pytest.mark.parametrize("mode", ["lockstep", "aligned"])
def test_waves_are_even(mode: Mode) -> None:
    lengths, ranks = lengths_of(3000, 1, longest=32768), 32
    policy = "pipeline_balanced" if mode == "aligned" else "balanced"
    plan = make_plan(lengths, ranks, context(policy), COST, mode, layers=32)
    static = make_plan(lengths, ranks, context("static", degree=4), COST, mode, layers=32)
    assert replay(plan).balance <= 1.10
    assert replay(plan).makespan < replay(static).makespan


def test_pipelines_have_levels_of_length() -> None:
    lengths, ranks = lengths_of(1500, 2, longest=30000), 8
    plan = make_plan(lengths, ranks, context("pipeline_balanced"), COST, "aligned", layers=8, pp=4)
    singles = [
        [plan.lengths[d] for unit in plan.of_rank(rank) if unit and len(unit.ring) == 1
         for d in unit.documents]
        for rank in range(ranks)
    ]  # fmt: skip
    spans = sorted((max(of_rank), min(of_rank)) for of_rank in singles if of_rank)
    assert all(low[0] <= high[1] for low, high in pairwise(spans)), spans
    rings = [sum(u.cost for u in plan.of_rank(r) if u and len(u.ring) > 1) for r in range(ranks)]
    counts = [len(order) for order in plan.orders]
    assert counts[int(np.argmin(rings))] > counts[int(np.argmax(rings))]


def test_a_pipeline_has_more_and_smaller_units() -> None:
    """A unit as long as the step would leave all other stages idle."""
    lengths = [60_000] * 8
    one, four = (
        make_plan(lengths, 16, context("pipeline_balanced"), COST, "aligned", layers=8, pp=pp)
        for pp in (1, 8)
    )
    assert max(u.cost for u in four.units) < max(u.cost for u in one.units)


def offloading(policy: str, host_gb: float, length: int = 64 * 1024, **fields: Any) -> Plan:
    costs = {"host_bandwidth_gb_per_s": host_gb}
    cost = CostModel.of(MODEL, ContextCosts(**costs))
    return make_plan(
        [length, 100], 16, context(policy, offload="selective", costs=costs, **fields), cost,
        "free", layers=32)  # fmt: skip


def test_offload_saves_ranks_where_it_is_hidden() -> None:
    """r = 1 leaves 2 of 32 layers: a rank takes up to 16 x its capacity."""
    plan = offloading("naive", 1e6)
    unit = next(unit for unit in plan.units if 0 in unit.documents)
    assert len(unit.ring) == 1
    assert unit.offload == (32 - 4) / 30, "8 x the capacity leaves 4 of 32 layers on the device"
    assert next(unit for unit in plan.units if 1 in unit.documents).offload == 0
    assert plan.describe()["offloaded"] == pytest.approx(unit.offload * 65536 / 65636)
    slow = offloading("naive", 1e-3)
    assert {len(unit.ring): unit.offload for unit in slow.units} == {8: 0.0, 1: 0.0}
    middle = offloading("naive", 25.0)
    share = next(unit for unit in middle.units if 0 in unit.documents).offload
    cost = CostModel.of(MODEL, ContextCosts(host_bandwidth_gb_per_s=25.0))
    assert share <= cost.hidden_share(np.array([65536.0]))[0]


def test_offload_is_less_where_balance_asks_for_more_ranks() -> None:
    plan = offloading("balanced", 1e6)
    unit = next(unit for unit in plan.units if 0 in unit.documents)
    assert len(unit.ring) > 1
    assert unit.offload < (32 - 4) / 30


def test_two_layers_cannot_be_offloaded() -> None:
    few = context("naive", offload="selective", capacity_tokens=16)
    with pytest.raises(UserError, match="the smallest has 2"):
        make_plan([64], 4, few, COST, "free", layers=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["data.max_document_tokens to 128", "capacity_tokens to 33", "parallel.hdp to 5"]),
        (
            {"policy": "static", "degree": 2},
            ["data.max_document_tokens to 64", "capacity_tokens to 65", "context.degree to 5"],
        ),
    ],
)
def test_a_document_that_fits_nowhere(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make_plan([129], 4, context(capacity_tokens=32, **fields), COST, "free", layers=8)
    for word in words:
        assert word in str(error.value)


def test_groups_that_leave_ranks_over() -> None:
    with pytest.raises(UserError, match=r"degree=3 must divide the 4 hdp ranks"):
        make_plan([1], 4, context("static", degree=3), COST, "free", layers=8)


def test_a_capacity_below_the_tensor_ranks() -> None:
    with pytest.raises(UserError, match="use at least 4"):
        make_plan([1], 4, context(capacity_tokens=3), COST, "free", layers=8, multiple=4)


def test_summary_is_json_and_counts() -> None:
    lengths = lengths_of(300)
    plan = make_plan(lengths, 16, context("naive"), COST, "lockstep", layers=32, round_count=4)
    described = json.loads(json.dumps(summary(plan, COST)))
    assert described["tokens"] == lengths.sum()
    assert sum(described["degrees"].values()) == described["documents"] == 300
    assert described["micro_batches"] == 16 * described["waves"]
    assert described["waves"] % 4 == 0
    real = sum(len(unit.ring) for unit in plan.units)
    assert described["dummies"] == described["micro_batches"] - real
    sent = sum(
        (len(unit.ring) - 1) * plan.tokens(unit) * 2 * 8 * 128 * 2 * 32 for unit in plan.units
    )
    assert described["bytes_forward"] == sent
    assert described["bytes_sent"] == sent * (1 + 1 + 2), "again, and gradients in fp32"


def test_ten_thousand_documents_are_planned_quickly() -> None:
    """The benchmark's limit is 50 ms; this test only detects gross regressions."""
    lengths = lengths_of(10_000, longest=2**20)
    times = []
    for _ in range(3):
        start = time.process_time()
        make_plan(lengths, 1024, context(), COST, "free", layers=32)
        times.append(time.process_time() - start)
    assert min(times) <= 0.5


def test_plans_say_what_they_hold() -> None:
    plan = make_plan([10, 7], 3, context("naive", capacity_tokens=4), COST, "free", layers=8)
    unit = next(unit for unit in plan.units if unit.documents == (0,))
    assert plan.tokens(unit) == 10
    assert [plan.member_tokens(unit, member) for member in range(3)] == [3, 3, 4]
    assert replace(plan, orders=((0, None), (0,), (0,))).of_rank(0) == (plan.units[0], None)
