"""Computation that can overlap a step's messages, counted on one simulated rank."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.models.moe import Experts, begin_step
from allometry.parallel import zero
from allometry.parallel.apply import parallelize
from allometry.parallel.overlap_log import Message, OverlapLog, step_messages
from allometry.parallel.reduce import FlatReducer
from allometry.parallel.simulate import even_experts, simulated_rank, without_storage
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import build_part

L = 32
MODEL = {
    "vocab_size": 64,
    "width": 32,
    "num_layers": 5,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "ffn_width": 48,
}
DENSE = MODEL | {"kind": "dense"}
MOE = MODEL | {
    "kind": "moe",
    "ffn_width": None,
    "experts": {
        "kind": "swiglu",
        "num_experts": 4,
        "experts_per_token": 2,
        "width": 16,
        "num_shared_experts": 1,
    },
    "router": {"gate": "softmax", "balance": {"kind": "bias"}},
}


def config(model: dict[str, Any], **parallel: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": L, "sources": [{"name": "none", "train": "none"}]},
            "batch": {"sequences": 16, "micro_batch_sequences": 2},
            "training": {"total_steps": 3, "compute_dtype": "bf16"},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "parallel": parallel,
        }
    )


def log_of(run: RunConfig, world_size: int) -> OverlapLog:
    with simulated_rank(run.parallel, 0, world_size) as mesh:
        plan = RunPlan.of(run, world_size)
        made = parallelize(
            lambda part: build_part(run, plan, part), run, Layout.of(run, world_size), mesh
        )
        if isinstance(made.sync, FlatReducer):
            made.sync._overlap = True  # as on CUDA
        with without_storage():
            made.materialize(mesh.device)
            for part in made.parts.values():
                even_experts(part)
                if run.model.kind == "moe":
                    begin_step(part, 2 * 2 * L)
            tokens_BL = torch.zeros(2, L, dtype=torch.int64)
            return step_messages(made, mesh, lambda part: (tokens_BL, tokens_BL))


def of(log: OverlapLog, kind: str, axis: str | None = None, owner: str = "") -> list[Message]:
    found = [
        m
        for m in log.messages
        if m.call.kind == kind and axis in (None, m.call.axis) and m.owner.startswith(owner)
    ]
    assert found, (kind, axis, owner, [(m.call.kind, m.call.axis, m.owner) for m in log.messages])
    return found


def blocks(messages: list[Message]) -> list[Message]:
    return [m for m in messages if "blocks." in m.owner]


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gathers_run_behind_the_blocks_before(model: dict[str, Any], stage: int) -> None:
    log = log_of(config(model, zero={"stage": stage}), 2)
    gathers = blocks(of(log, "all-gather", owner="gather"))
    exposed = [m.owner for m in gathers if m.behind == 0]
    # No computation precedes the first two blocks of a forward.
    assert all(" blocks.0" in name or " blocks.1" in name for name in exposed), exposed


def test_without_prefetch_gathers_of_a_forward_are_waited_for() -> None:
    with mock.patch.object(zero, "prefetch"):
        log = log_of(config(DENSE, zero={"stage": 1}), 2)
    assert {m.behind for m in blocks(of(log, "all-gather", owner="gather"))} == {0}


def test_gathers_are_two_blocks_ahead() -> None:
    log = log_of(config(DENSE, zero={"stage": 3}), 2)
    order = [m.owner for m in blocks(log.messages) if m.owner.startswith("gather")]
    forward = [f"gather blocks.{i}" for i in (0, 1, 2, 3, 4)]
    assert order == 2 * [*forward, *reversed(forward[:-1])]  # the last one stays
    third = next(m for m in log.messages if m.owner == "gather blocks.2")
    first = next(m for m in log.messages if m.owner == "gather blocks.0")
    assert first.behind == 0
    # All computation of the two blocks before it.
    fourth = next(m for m in log.messages if m.owner == "gather blocks.3")
    assert third.behind == 2 * (fourth.begun - third.begun) > 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reductions_run_behind_the_backward_of_earlier_blocks(stage: int) -> None:
    log = log_of(config(DENSE, zero={"stage": stage}), 2)
    reductions = blocks(of(log, "reduce-scatter", owner="reduce"))
    assert [m.owner for m in reductions if m.behind == 0] == (
        ["reduce blocks.0"] * (1 if stage == 1 else 2)
    )


def test_buckets_run_behind_the_last_backward() -> None:
    run = config(DENSE, hdp=2)
    run.parallel.zero.__dict__["bucket_mib"] = 1 / 2**6  # 16 KiB: about one for each block
    log = log_of(run, 2)
    buckets = of(log, "all-reduce", owner="bucket")
    assert len(buckets) > 5
    assert sum(m.behind > 0 for m in buckets) >= len(buckets) - 2


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, {"ep": 2}), (4, {"ep": 2, "tp": 2}), (4, {"ep": 2, "tp": 2, "expert_tp": 1})],
    ids=["ep2", "ep2-tp2", "whole"],
)
def test_rows_travel_behind_the_shared_expert(world_size: int, layout: dict[str, Any]) -> None:
    log = log_of(config(MOE, **layout), world_size)
    rows = [m for m in of(log, "all-to-all") if m.call.dtype == "bfloat16" and m.call.axis != "tp"]
    # Forward there and back, backward there and back, five layers, two micro-batches: one direction
    # of each can overlap with the shared expert.
    assert len(rows) == 4 * 5 * 2
    assert sum(m.behind > 0 for m in rows) == 2 * 5 * 2


def test_without_the_shared_expert_rows_are_waited_for() -> None:
    def after(
        self: Experts, x: Any, gates: Any, experts: Any, beside: Any = None, **more: Any
    ) -> Any:
        y, _ = original(self, x, gates, experts, **more)
        return y, beside()

    original = Experts.forward
    with mock.patch.object(Experts, "forward", after):
        log = log_of(config(MOE, ep=2), 2)
    rows = [m for m in of(log, "all-to-all") if m.call.dtype == "bfloat16"]
    assert {m.behind for m in rows} == {0}


def test_each_row_is_sent_once() -> None:
    sent = {}
    for name, layout in {"alone": {"ep": 2}, "cut": {"ep": 2, "tp": 2}}.items():
        log = log_of(config(MOE, **layout), 2 * (2 if "tp" in layout else 1))
        rows = [m for m in of(log, "all-to-all", "ep") if m.call.dtype == "bfloat16"]
        sent[name] = sum(m.call.bytes for m in rows)
    assert sent["cut"] * 2 == sent["alone"], "two tp ranks send half of the rows each"


@pytest.mark.parametrize("overlap", ["off", "chunked"])
def test_tensor_parallel_messages_run_behind_products(overlap: str) -> None:
    log = log_of(config(DENSE, tp=2, tp_overlap=overlap), 2)
    messages = [m for m in log.messages if m.call.dtype == "bfloat16"]
    hidden = sum(m.call.bytes for m in messages if m.behind > 0)
    share = hidden / sum(m.call.bytes for m in messages)
    assert share == 0 if overlap == "off" else share > 0.6, share
