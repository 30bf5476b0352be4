"""The plan's memory, computed without torch, equals that of the real sharded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import allometry.configs
import tiny
from allometry.configs.errors import UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.models.transformer import Part, Transformer
from allometry.optim.build import init_states
from allometry.parallel.apply import parallelize
from allometry.parallel.simulate import simulated_rank, without_storage
from allometry.scaling.memory import COMPUTE_BYTES, EXACT, estimate_memory, gathered_bytes
from allometry.scaling.plan import RunPlan
from allometry.scaling.saved import Kernels
from allometry.scaling.shards import RankParts
from allometry.studies.rehearse import rehearse
from allometry.trainer.assemble import make_optimizer
from test_dist_latent import DEEPSEEK
from test_dist_layouts import DENSE, LATENT, MOE, run
from thinned import thinned

PRESETS = sorted(
    path.stem for path in (Path(allometry.configs.__file__).parent / "presets").glob("*.yaml")
)
OTHERS = {"llama3_2_1b", "qwen2_5_0_5b", "qwen3_0_6b", "olmo2_1b", "gemma3_1b", "moe_deepseek_v3"}
OTHERS |= {"moe_latent_1b"}
"""Presets whose kinds of modules smaller models show."""
WORLD_SIZES = (1, 8, 64)
Held = dict[str, int]


def sharded_model(config: RunConfig, plan: RunPlan, pp_rank: int) -> Held:
    """Return the bytes of the trainer's model on the first rank of a pipeline stage."""

    def build(part: Part) -> Transformer:
        with torch.device("meta"):
            return build_model(
                config.model, plan.parameterization, config.training.compute_dtype, part
            )

    degrees = plan.layout.degrees
    rank = pp_rank * degrees.hdp * degrees.tp
    with simulated_rank(config.parallel, rank, plan.world_size) as mesh:
        parallel = parallelize(build, config, plan.layout, mesh)
        with without_storage():
            parallel.materialize(mesh.device)
            optimizer = make_optimizer(config, plan, parallel, mesh)
            init_states(optimizer)
            here = [p for part in parallel.parts.values() for p in part.parameters()]
            states = [value for state in optimizer.state.values() for value in state.values()]
            # A gradient is as large as its parameter; other tests check this with real steps.
            return {
                "parameters": nbytes(here),
                "gradients": nbytes(here),
                "optimizer_states": nbytes(states),
            }


def nbytes(tensors: list[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def stated(config: RunConfig, plan: RunPlan, pp_rank: int) -> Held:
    memory = estimate_memory(
        config.model,
        micro_batch_tokens=plan.micro_batch_tokens,
        compute_bytes=COMPUTE_BYTES[config.training.compute_dtype],
        zero=config.parallel.zero,
        hdp=plan.hdp,
        layout=plan.layout,
        optimizer=config.optimizer,
        pp_rank=pp_rank,
    )
    return {kind: getattr(memory, kind) for kind in EXACT}


def compare(config: RunConfig, world_size: int) -> None:
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"compile": False})}
    )
    plan = RunPlan.of(config, world_size)
    ranks = [stated(config, plan, rank) for rank in range(plan.layout.pp)]
    assert ranks == [sharded_model(config, plan, rank) for rank in range(plan.layout.pp)]
    held = [getattr(plan.memory, kind) for kind in ranks[0]]
    assert held in [list(rank.values()) for rank in ranks]


@pytest.mark.parametrize(
    ("preset", "world_size"),
    thinned(
        {
            *((p, 64) for p in PRESETS if p not in OTHERS),
            ("demo", 1),
            ("moe_demo", 8),
            ("dense_7b", 8),
        },
        PRESETS,
        WORLD_SIZES,
    ),
)
def test_every_preset(preset: str, world_size: int) -> None:
    fits = "batch={sequences: 1024, micro_batch_sequences: 1}"
    if preset == "documents_demo":
        fits = "parallel.context.capacity_tokens=4096"
    config = load(f"preset:{preset}", [fits])
    if config.stages is not None:
        config = config.of_stages()[0]  # the only stage with that batch
    if world_size < config.parallel.ep:
        with pytest.raises(UserError, match=r"parallel\.ep=8 must divide hdp=1"):
            RunPlan.of(config, world_size)
        return
    compare(config, world_size)


@pytest.mark.parametrize(
    ("model", "world_size", "layout"),
    [
        (DENSE, 4, {"tp": 2, "zero": {"stage": 2}}),
        (DENSE | {"tied_embeddings": True}, 4, {"pp": 2, "zero": {"stage": 1}}),
        (DENSE, 12, {"tp": 4, "pp": 3, "pipeline": {"schedule": "zbv_zero_bubble"}}),
        (DENSE, 8, {"zero": {"stage": 3, "replicas": 2}}),
        (MOE, 4, {"ep": 2, "zero": {"stage": 3}}),
        (MOE, 8, {"zero": {"stage": 1}}),  # 4 experts on 8 ranks
        (MOE, 8, {"tp": 2, "ep": 2, "zero": {"stage": 2}}),
        (LATENT, 8, {"tp": 4, "ep": 2, "zero": {"stage": 0}}),
        (LATENT, 8, {"tp": 2, "pp": 2, "zero": {"stage": 3}}),
        (MOE, 16, {"tp": 2, "pp": 2, "zero": {"stage": 2, "replicas": 2}}),
        (MOE, 8, {"tp": 2, "ep": 2, "expert_tp": 1, "zero": {"stage": 2}}),
        (LATENT, 4, {"tp": 2, "expert_tp": 1, "zero": {"stage": 1}}),
        (DEEPSEEK, 8, {"tp": 2, "ep": 2, "zero": {"stage": 3}}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muonh", "sgd_sai"])
def test_every_kind_of_cut(
    model: dict[str, Any], world_size: int, layout: dict[str, Any], optimizer: str
) -> None:
    config = run(model, "fp32", **layout).model_dump()
    rule = {"kind": optimizer, "lr": 1e-3, "weight_decay": 0.0}
    compare(RunConfig.model_validate(config | {"optimizer": rule}), world_size)


def test_no_message_is_larger_where_there_are_more_ranks_than_experts() -> None:
    (report,) = rehearse(run(MOE, "fp32", zero={"stage": 3}), 8)
    largest = max(call.bytes for call, _ in report.collectives if call.kind == "all-gather")
    blocks = tiny.build(run(MOE, "fp32")).blocks.values()
    whole = 4 * max(sum(p.numel() for p in block.parameters()) for block in blocks)
    # Rows of norms, router and attention are padded to the number of ranks, experts are not.
    assert whole <= largest < 1.1 * whole


@pytest.mark.parametrize(
    ("model", "world_size", "layout"),
    [
        (DENSE, 2, {"zero": {"stage": 1}}),
        (DENSE | {"tied_embeddings": True}, 4, {"pp": 2, "zero": {"stage": 3}}),
        (MOE, 4, {"tp": 2, "zero": {"stage": 2}}),
        (MOE, 8, {"tp": 2, "ep": 2, "expert_tp": 1, "zero": {"stage": 2}}),
        (LATENT, 4, {"zero": {"stage": 3, "regather": "step"}}),
    ],
)
def test_parameters_that_stay_gathered_are_as_large_as_stated(
    model: dict[str, Any], world_size: int, layout: dict[str, Any]
) -> None:
    config = run(model, "bf16", **layout)
    plan = RunPlan.of(config, world_size)
    shards = plan.hdp // config.parallel.zero.replicas
    for pp_rank in range(plan.layout.pp):
        rank = pp_rank * plan.hdp * plan.layout.degrees.tp
        with simulated_rank(config.parallel, rank, world_size) as mesh:
            made = parallelize(lambda part: tiny.build(config, part), config, plan.layout, mesh)
            with without_storage():
                made.materialize(mesh.device)
                for part in made.parts.values():
                    for unit in part.modules():
                        if isinstance(unit, FSDPModule):
                            unit.unshard()
                here = nbytes([p for part in made.parts.values() for p in part.parameters()])
        stated = gathered_bytes(
            RankParts.of(config.model, plan.layout, pp_rank, shards), Kernels(2, False, 0)
        )
        assert sum(stated.values()) == here
