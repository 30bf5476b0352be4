"""Supported layouts of a run, and the wording of refusals."""

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig, Pipeline
from allometry.configs.run import RunConfig
from allometry.scaling.count import flops_per_token, layer_flops
from allometry.scaling.degrees import resolve_degrees
from allometry.scaling.layout import Layout, split_layers

DENSE = {
    "kind": "dense",
    "vocab_size": 64,
    "width": 32,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "ffn_width": 96,
}
MOE = {
    **DENSE,
    "kind": "moe",
    "first_dense_layers": 1,
    "experts": {"kind": "swiglu", "num_experts": 6, "experts_per_token": 2, "width": 24},
}


def run(model: dict[str, Any] = DENSE, sequences: int = 16, **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": 64, "sources": [{"name": "a", "train": "a"}]},
            "batch": {"sequences": sequences, "micro_batch_sequences": 1},
            "training": {"total_steps": 1},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": parallel,
        }
    )


def refusal(config: RunConfig, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        Layout.of(config, world_size)
    return str(caught.value)


def test_degrees() -> None:
    degrees = resolve_degrees(ParallelConfig(pp=2, tp=2), 24)
    assert (degrees.pp, degrees.hdp, degrees.tp, degrees.ep, degrees.shard) == (2, 6, 2, 1, 6)
    hybrid = ParallelConfig.model_validate({"hdp": 8, "ep": 2, "zero": {"stage": 2, "replicas": 2}})
    assert resolve_degrees(hybrid, 8).shard == 4


@pytest.mark.parametrize(
    ("parallel", "world_size", "sentence"),
    [
        (
            {"hdp": 4},
            2,
            "parallel.hdp=4 (with pp=1 and tp=1) needs 4 ranks, but there are 2; set "
            "parallel.hdp=2 or auto, or start 4 ranks (torchrun --nproc-per-node)",
        ),
        (
            {"hdp": 2, "pp": 2, "tp": 2},
            6,
            "parallel.hdp=2 (with pp=2 and tp=2) needs 8 ranks, but "
            "there are 6; set start 8 ranks (torchrun --nproc-per-node)",
        ),
        (
            {"pp": 2, "tp": 2},
            6,
            "parallel.pp=2 x parallel.tp=2 must divide the number of ranks, 6; "
            "start a multiple of 4 ranks or change one of them",
        ),
        ({"ep": 4}, 6, "parallel.ep=4 must divide hdp=6; use 1, 2, 3 or 6"),
        (
            {"zero": {"stage": 1, "replicas": 4}},
            6,
            "parallel.zero.replicas=4 must divide hdp=6; use 1, 2, 3 or 6",
        ),
        (
            {"ep": 4, "zero": {"stage": 1, "replicas": 2}},
            4,
            "parallel.ep=4 must divide hdp/replicas=2; use 1 or 2",
        ),
    ],
)
def test_degrees_that_do_not_fit(parallel: dict[str, Any], world_size: int, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_degrees(ParallelConfig.model_validate(parallel), world_size)
    assert str(caught.value) == sentence.replace("set start", "start")


@pytest.mark.parametrize(
    ("model", "parallel", "world_size", "sentence"),
    [
        (DENSE, {"tp": 8}, 8, "parallel.tp=8 must divide model.num_kv_heads=4; use 1, 2 or 4"),
        (
            MOE | {"experts": MOE["experts"] | {"width": 26}},
            {"tp": 4},
            4,
            "parallel.tp=4 must divide model.experts.width=26; use 1 or 2",
        ),
        (
            DENSE,
            {"ep": 2},
            2,
            "parallel.ep=2 needs experts, but model.kind=dense has none; use "
            "parallel.ep=1 or model.kind=moe",
        ),
        (
            MOE,
            {"ep": 4},
            4,
            "parallel.ep=4 must divide model.experts.num_experts=6; use 1, 2, 3 or 6",
        ),
        (
            DENSE | {"dropout": 0.1},
            {"tp": 2},
            2,
            "model.dropout=0.1 with parallel.tp=2: its masks "
            "would depend on the layout; set model.dropout: 0 or parallel.tp: 1",
        ),
        (
            DENSE,
            {"pp": 8, "pipeline": {"schedule": "interleaved_1f1b"}},
            8,
            "parallel.pp=8 with 2 stages on each rank "
            "(parallel.pipeline.schedule=interleaved_1f1b) needs 16 layers, but "
            "model.num_layers=8; use parallel.pp at most 4, or fewer stages on each "
            "rank or a schedule that has one (1f1b, gpipe)",
        ),
        (
            DENSE,
            {"pp": 2, "pipeline": {"stages_per_rank": 2}},
            2,
            "parallel.pipeline.stages_per_rank=2: schedule 1f1b runs 1 on each rank; use 1 or null",
        ),
        (
            DENSE,
            {"pp": 2, "pipeline": {"split": [3, 4]}},
            2,
            "parallel.pipeline.split=[3, 4] must be 2 positive numbers, one for each stage, "
            "whose sum is model.num_layers=8; or use flops",
        ),
        (
            DENSE,
            {"hdp": 8, "pp": 4},
            32,
            "parallel.pipeline.schedule=1f1b on pp=4 needs at least 4 "
            "micro-batches, but a batch of 16 sequences is 2 on each rank (hdp=8, "
            "batch.micro_batch_sequences=1); use batch.sequences=32 or 40, "
            "fewer hdp ranks or another schedule",
        ),
        (
            DENSE,
            {"hdp": 1, "pp": 3, "pipeline": {"schedule": "interleaved_zero_bubble"}},
            3,
            "parallel.pipeline.schedule=interleaved_zero_bubble on pp=3 needs "
            "micro-batches in equal rounds of at least 3, or fewer than 3, but a "
            "batch of 16 sequences is 16 on each rank "
            "(hdp=1, batch.micro_batch_sequences=1); use batch.sequences=15 or 18, "
            "fewer hdp ranks or another schedule",
        ),
    ],
)
def test_what_a_model_cannot_take(
    model: dict[str, Any], parallel: dict[str, Any], world_size: int, sentence: str
) -> None:
    assert refusal(run(model, **parallel), world_size) == sentence


def test_stages_and_who_runs_them() -> None:
    loop = Layout.of(run(pp=2, pipeline={"schedule": "interleaved_1f1b"}), 2)
    assert [loop.rank_of(stage) for stage in range(4)] == [0, 1, 0, 1]
    assert loop.stages_of(1) == (1, 3)
    vee = Layout.of(run(pp=2, pipeline={"schedule": "zbv_zero_bubble"}), 2)
    assert [vee.rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]
    uneven = Layout.of(run(pp=2, pipeline={"split": [5, 3]}), 2)
    assert uneven.stages == (range(5), range(5, 8))


def test_costs_of_layers_add_up_to_the_model() -> None:
    for model in (DENSE, MOE):
        config = run(model)
        costs = layer_flops(config.model, 64)
        assert len(costs) == 10
        assert sum(costs) == flops_per_token(config.model, 64).forward


@given(
    costs=st.lists(st.integers(0, 9), min_size=3, max_size=10),
    data=st.data(),
)
def test_a_split_is_as_even_as_can_be(costs: list[int], data: st.DataObject) -> None:
    layers = len(costs) - 2
    stages = data.draw(st.integers(1, layers))
    parts = split_layers(costs, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert all(len(part) > 0 for part in parts)

    def dearest(cuts: list[int]) -> int:
        prices = [sum(costs[1 + a : 1 + b]) for a, b in pairwise(cuts)]
        prices[0] += costs[0]
        prices[-1] += costs[-1]
        return max(prices)

    every = [[0, *cut, layers] for cut in combinations(range(1, layers), stages - 1)]
    assert dearest([part.start for part in parts] + [layers]) == min(map(dearest, every))


@pytest.mark.parametrize(
    ("training", "what"),
    [
        ({"compile": True}, "compiled blocks cannot; set training.compile: false or schedule: "),
        (
            {"activation_checkpointing": "selective"},
            "selective checkpointing cannot; set training.activation_checkpointing: full or none, "
            "or schedule: ",
        ),
    ],
)
def test_backward_in_two_halves_has_limits(training: dict[str, Any], what: str) -> None:
    config = run(pp=2, pipeline={"schedule": "zbv_zero_bubble"})
    assert len(Layout.of(config, 2).stages) == 4
    limited = config.model_copy(update={"training": config.training.model_copy(update=training)})
    sentence = "parallel.pipeline.schedule=zbv_zero_bubble splits backward in two, which "
    assert refusal(limited, 2) == f"{sentence}{what}interleaved_1f1b"
    whole = {"parallel": limited.parallel.model_copy(update={"pipeline": Pipeline()})}
    assert len(Layout.of(limited.model_copy(update=whole), 2).stages) == 2
