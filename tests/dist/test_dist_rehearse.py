"""The bytes and messages of a dry run equal those of real ranks."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tiny
from allometry.configs.run import RunConfig
from allometry.models.moe import begin_step
from allometry.parallel.mesh import open_mesh
from allometry.parallel.simulate import Collective, CollectiveLog
from allometry.scaling.loads import BalanceLoads
from allometry.scaling.memory import estimate_memory
from allometry.scaling.plan import RunPlan
from allometry.studies.rehearse import rehearse
from test_dist_layouts import DENSE, MOE, run

RunRanks = Callable[..., list[Any]]


def real_step(config: RunConfig) -> tuple[dict[Collective, int], dict[str, int]]:
    """(On each rank) the collectives of one step, and the memory after it."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        parallel = tiny.parallel(config, mesh)
        for part in parallel.parts.values():
            if config.model.kind == "moe":
                begin_step(part, 8 * tiny.LENGTH)
        batches = [
            tiny.MicroBatch(batch.tokens_BL, batch.targets_BL, None)
            for batch in tiny.micro_batches(8)[mesh.hdp.rank :: mesh.hdp.size]
        ]
        loads = BalanceLoads.of(config)
        with CollectiveLog(mesh) as log:
            if loads is not None and loads.loads == "this_batch":
                parallel.execution.count_visits(batches)
            parallel.execution.train(batches, torch.tensor(0.1), lambda *_: None)

        def nbytes(tensors: Any) -> int:
            locals_ = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
            return sum(t.numel() * t.element_size() for t in locals_)

        parameters = [p for _, p in parallel.named_parameters()]
        return dict(Counter(log.calls)), {
            "parameters": nbytes(parameters),
            "gradients": nbytes([p.grad for p in parameters]),
        }


@pytest.mark.parametrize(
    ("model", "world_size", "settings"),
    [
        (DENSE, 4, {"tp": 2}),
        (DENSE, 4, {"tp": 2, "zero": {"stage": 3}}),
        (DENSE, 2, {"zero": {"stage": 1}}),
        (DENSE, 2, {"zero": {"stage": 2}, "checkpointing": "full"}),
        (MOE, 4, {"tp": 2, "zero": {"stage": 2}}),
    ],
)
def test_collectives_and_bytes_are_those_of_a_real_step(
    run_ranks: RunRanks, model: dict[str, Any], world_size: int, settings: dict[str, Any]
) -> None:
    config = run(model, "fp32", **settings)
    calls, held = run_ranks(real_step, world_size, config)[0]
    (rehearsed,) = rehearse(config, world_size)
    # Clipping runs after the step.
    scalars = {call for call, _ in rehearsed.collectives if call.bytes == 8}
    wanted = {call: n for call, n in rehearsed.collectives if call not in scalars}
    counted = {call: n for call, n in calls.items() if call not in scalars}
    assert counted == wanted
    assert len(counted) > 1
    for kind, size in held.items():
        assert rehearsed.bytes_held[kind] == size, kind


def test_each_pipeline_rank_reports_its_stages() -> None:
    config = run(DENSE, "fp32", pp=2, tp=2, pipeline={"schedule": "zbv_zero_bubble"})
    first, second = rehearse(config, 4)
    assert (first.stages, second.stages) == ((0, 3), (1, 2))
    hidden = tiny.LENGTH // 2 * 24 * 4
    sends = {call: n for call, n in second.collectives if call.axis == "pp" and call.ranks == 2}
    assert sends[Collective("send forward", "pp", 2, hidden, "float32")] == 8
    assert sends[Collective("send backward", "pp", 2, hidden, "float32")] == 8


def test_a_tied_head_in_another_stage_is_sent_and_sends_back() -> None:
    tied = DENSE | {"tied_embeddings": True}
    first, last = rehearse(run(tied, "fp32", pp=2, hdp=2, zero={"stage": 1}), 4)
    shard = (tiny.VOCAB + 1) // 2 * 24 * 4
    assert dict(first.collectives)[Collective("send tied weight", "pp", 2, shard, "float32")] == 1
    assert dict(last.collectives)[Collective("send tied gradient", "pp", 2, shard, "float32")] == 1
    around = run(tied, "fp32", pp=2, pipeline={"schedule": "zbv_zero_bubble"})
    kinds = {call.kind for rank in rehearse(around, 2) for call, _ in rank.collectives}
    assert "send forward" in kinds
    assert not {kind for kind in kinds if "tied" in kind}


def test_experts_travel_in_equal_parts() -> None:
    config = run(MOE, "fp32", ep=4)
    (report,) = rehearse(config, 4)
    exchanged = {call: number for call, number in report.collectives if call.kind == "all-to-all"}
    # Two MoE layers, two micro-batches; rows in both directions: counting, forward, backward.
    rows = tiny.LENGTH * 2
    assert exchanged[Collective("all-to-all", "ep", 4, rows * 24 * 4, "float32")] == 2 * 2 * 6


@pytest.mark.parametrize(
    ("model", "world_size", "settings"),
    [
        (DENSE, 4, {"tp": 2, "zero": {"stage": 2}}),
        (DENSE, 4, {"pp": 2, "zero": {"stage": 1}}),
        (MOE, 4, {"ep": 2, "zero": {"stage": 3}}),
    ],
)
def test_the_estimate_without_torch_is_near(
    model: dict[str, Any], world_size: int, settings: dict[str, Any]
) -> None:
    config = run(model, "fp32", **settings)
    plan = RunPlan.of(config, world_size)
    exact = max(rehearse(config, world_size), key=lambda rank: rank.bytes_held["parameters"])
    assert plan.memory.parameters == pytest.approx(exact.bytes_held["parameters"], rel=0.1)
    assert plan.memory.optimizer_states == pytest.approx(
        exact.bytes_held["optimizer states"], rel=0.1
    )
    assert (
        estimate_memory(
            config.model, micro_batch_tokens=16, compute_bytes=4, zero=config.parallel.zero, hdp=1
        ).parameters
        > plan.memory.parameters
    )
