"""Supported settings of hybrid data/context parallelism, and the wording of refusals."""

from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.scaling.context import check_context, mode_of
from allometry.scaling.degrees import resolve_degrees
from allometry.scaling.layout import Layout


def run(
    context: dict[str, Any] | None = None,
    longest: int = 128,
    kind: str = "documents",
    dropout: float = 0.0,
    moe: bool = False,
    **parallel: Any,
) -> RunConfig:
    model: dict[str, Any] = {
        "kind": "dense",
        "vocab_size": 64,
        "width": 32,
        "num_layers": 8,
        "num_heads": 8,
        "ffn_width": 96,
        "dropout": dropout,
    }
    if moe:
        model |= {
            "kind": "moe",
            "first_dense_layers": 1,
            "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 24},
        }
    data: dict[str, Any] = {"sequence_length": 64, "sources": [{"name": "a", "train": "a"}]}
    if kind == "documents":
        data |= {"kind": "documents", "max_document_tokens": longest}
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": data,
            "batch": {"sequences": 16, "micro_batch_sequences": 1},
            "training": {"total_steps": 1},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": {**parallel, "context": context or {}},
        }
    )


def refusal(config: RunConfig, world_size: int) -> str:
    with pytest.raises(UserError) as caught:
        check_context(config, resolve_degrees(config.parallel, world_size))
    with pytest.raises(UserError):
        Layout.of(config, world_size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "mode"),
    [
        ({}, "free"),
        ({"zero": {"stage": 1}}, "free"),
        ({"tp": 2}, "free"),
        ({"zero": {"stage": 2}}, "lockstep"),
        ({"zero": {"stage": 3}}, "lockstep"),
        ({"ep": 2, "moe": True}, "lockstep"),
        ({"pp": 2}, "lockstep"),
        ({"pp": 2, "context": {"policy": "pipeline_balanced"}}, "aligned"),
        ({"pp": 2, "zero": {"stage": 2}, "context": {"policy": "pipeline_balanced"}}, "aligned"),
    ],
)
def test_modes(parallel: dict[str, Any], mode: str) -> None:
    config = run(**parallel)
    Layout.of(config, 4)
    assert mode_of(config, resolve_degrees(config.parallel, 4)) == mode


@pytest.mark.parametrize(
    ("policy", "parallel"),
    [("balanced", {"pp": 2}), ("naive", {}), ("static", {}), ("pipeline_balanced", {"pp": 2})],
)
def test_what_can_be(policy: str, parallel: dict[str, Any]) -> None:
    context: dict[str, Any] = {"policy": policy, "capacity_tokens": 64}
    if policy == "static":
        context["degree"] = 2
    else:
        context["offload"] = "selective"
    found = Layout.of(run(context, **parallel), 4)
    assert found.degrees.hdp == 4 // parallel.get("pp", 1)


def test_context_without_documents_is_not_ignored() -> None:
    Layout.of(run(kind="sequences"), 4)
    words = refusal(run({"capacity_tokens": 4096}, kind="sequences"), 4)
    assert "parallel.context.capacity_tokens has no effect while data.kind is sequences" in words
    words = refusal(run({"costs": {"tflops": 100.0}}, kind="sequences"), 4)
    assert "parallel.context.costs" in words


def test_documents_longer_than_all_ranks() -> None:
    words = refusal(run({"capacity_tokens": 32}, longest=129), 4)
    assert "data.max_document_tokens=129 does not fit hdp=4 ranks" in words
    assert "data.max_document_tokens: 128 or less" in words
    assert "capacity_tokens: 33 or more" in words
    assert "hdp: 5 or more" in words
    Layout.of(run({"capacity_tokens": 32}, longest=128), 4)


def test_documents_longer_than_a_group() -> None:
    words = refusal(run({"policy": "static", "degree": 2, "capacity_tokens": 63}), 4)
    assert "parallel.context.degree=2 ranks" in words
    assert "parallel.context.degree: 3 or more" in words


def test_capacity_is_shared_by_tensor_ranks() -> None:
    words = refusal(run({"capacity_tokens": 129}, tp=2), 4)
    assert "capacity_tokens=129 must be a multiple of parallel.tp=2; use 130" in words


def test_groups_divide_the_ranks() -> None:
    words = refusal(run({"policy": "static", "degree": 3}), 4)
    assert "degree=3 must divide hdp=4; use 1, 2 or 4" in words


def test_pipeline_balance() -> None:
    context = {"policy": "pipeline_balanced"}
    assert "but parallel.pp=1" in refusal(run(context), 4)
    assert "parallel.zero.stage=3 cannot" in refusal(run(context, pp=2, zero={"stage": 3}), 4)
    assert "parallel.ep: 1" in refusal(run(context, pp=2, ep=2, moe=True), 4)


def test_offload() -> None:
    selective = {"offload": "selective"}
    assert "policy: static" in refusal(run({**selective, "policy": "static"}), 2)
    Layout.of(run(selective, pp=2), 4)
    uneven = {"schedule": "1f1b", "split": [6, 2]}
    interleaved = {"schedule": "interleaved_1f1b", "stages_per_rank": 4}
    for least, parallel in (
        (2, {"pp": 4}),
        (2, {"pp": 2, "pipeline": uneven}),
        (1, {"pp": 2, "pipeline": interleaved}),
    ):
        with pytest.raises(UserError, match=f"the smallest has {least};"):
            Layout.of(run(selective, **parallel), 4)


@pytest.mark.parametrize("kind", ["documents", "sequences"])
def test_offload_of_every_micro_batch(kind: str) -> None:
    def offloaded(share: float, **parallel: Any) -> RunConfig:
        made = run(kind=kind, **parallel)
        training = made.training.model_copy(update={"activation_offload": share})
        return made.model_copy(update={"training": training})

    Layout.of(offloaded(1.0, pp=2), 4)
    words = r"training.activation_offload=0.5 leaves two layers .* the smallest has 2;"
    with pytest.raises(UserError, match=words):
        Layout.of(offloaded(0.5, pp=4), 4)
    if kind == "documents":
        both = offloaded(0.5)
        context = both.parallel.context.model_copy(update={"offload": "selective"})
        parallel = both.parallel.model_copy(update={"context": context})
        with pytest.raises(UserError, match=r"offload=0.5 sends activations of every document"):
            Layout.of(both.model_copy(update={"parallel": parallel}), 4)


def test_costs_are_what_the_dry_run_assumes_of_offload() -> None:
    costs = {"costs": {"host_bandwidth_gb_per_s": 50.0}}
    assert "parallel.context.costs has no effect" in refusal(run(costs, kind="sequences"), 4)
    made = run(costs, kind="sequences")
    training = made.training.model_copy(update={"activation_offload": 0.5})
    Layout.of(made.model_copy(update={"training": training}), 4)


def test_dropout() -> None:
    assert "set model.dropout: 0" in refusal(run(dropout=0.1), 2)
    Layout.of(run(dropout=0.1), 1)
