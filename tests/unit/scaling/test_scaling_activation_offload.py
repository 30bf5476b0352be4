"""The plan's numbers for activation offload, against the bytes that a model moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from allometry.configs.execution import Zero
from allometry.configs.loader import load
from allometry.configs.model import DenseModel, MoEModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers
from allometry.models.precision import use_precision
from allometry.parallel.checkpointing import apply_checkpointing
from allometry.parallel.offload.store import apply_offload
from allometry.scaling.memory import FUSED_ATTENTION, estimate_memory
from allometry.scaling.offload import offloaded
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.plan import RunPlan

SHAPE = {"vocab_size": 64, "width": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2}
EXPERTS = {"kind": "swiglu", "num_experts": 8, "experts_per_token": 2, "width": 96}
MODELS: dict[str, Any] = {
    "dense": DenseModel.model_validate({**SHAPE, "kind": "dense", "ffn_width": 352}),
    "moe": MoEModel.model_validate({**SHAPE, "kind": "moe", "experts": EXPERTS}),
}


@pytest.mark.parametrize("saved", ["compute", "fp8"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_what_the_estimate_takes_off_moves(name: str, checkpointing: Any, saved: Any) -> None:
    model = MODELS[name]
    rules = Parameterization(StandardParameterization(), model)
    module = build_model(model, rules, "fp32")
    initialize(module, rules, seed=0)
    use_precision(module, PrecisionConfig(saved_activations=saved))
    if checkpointing != "none":
        apply_checkpointing(module, checkpointing, dropout=False)
    store = apply_offload(module, torch.device("cpu"), share=0.5)
    store.smallest_bytes = 1024
    tokens = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(0))
    if routers(module):
        begin_step(module, tokens.numel())
    module(tokens, tokens)
    whole, left = (
        estimate_memory(
            model,
            micro_batch_tokens=tokens.numel(),
            compute_bytes=4,
            zero=Zero(stage=0),
            hdp=1,
            checkpointing=checkpointing,
            attention=FUSED_ATTENTION._replace(device="cpu"),
            precision=PrecisionConfig(saved_activations=saved),
            activation_offload=share,
        )
        for share in (0.0, 0.5)
    )
    assert whole.activations - left.activations == pytest.approx(store.bytes_out, rel=0.1)
    for part in ("parameters", "gradients", "optimizer_states", "reduction", "compute_copies"):
        assert getattr(whole, part) == getattr(left, part)


def test_the_first_layers_of_each_stage_go() -> None:
    assert offloaded(1.0, (range(4), range(4, 9))) == {0, 1, 4, 5, 6}
    assert offloaded(0.5, (range(4), range(4, 9))) == {0, 4, 5}
    assert offloaded(0.0, (range(9),)) == offloaded(1.0, (range(2),)) == frozenset()


def plan(*changes: str, world_size: int = 32) -> RunPlan:
    return RunPlan.of(load("preset:dense_7b", ["batch.ramp=null", *changes]), world_size)


SHARE, FULL = "training.activation_offload=0.5", "training.activation_checkpointing=full"


def test_what_travels_by_hand() -> None:
    """A checkpointed block's input in bf16: 4096 numbers for each of 4096 tokens."""
    assert plan(FULL).activation_traffic is None
    planned = plan(FULL, SHARE)
    traffic = planned.activation_traffic
    assert traffic is not None
    assert (traffic.layers, traffic.layer_bytes) == (15, 2 * 4096 * 4096)
    assert traffic.step_bytes == 15 * traffic.layer_bytes * planned.micro_batches(10**6)
    assert traffic.copy_s == pytest.approx(traffic.layer_bytes / 25e9)
    layer = planned.flops_per_token.forward / 32 * 4096 / 400e12  # and a part of the head
    assert layer * 0.9 < traffic.forward_s < layer
    assert traffic.hides
    assert planned.describe()["activation_offload"]["hides"] is True


def test_layouts_share_what_travels() -> None:
    """Tensor parallelism divides bytes and FLOPs; a pipeline divides layers,
    minus two per stage."""
    one, cut = (plan(FULL, SHARE, *more).activation_traffic for more in ((), ("parallel.tp=2",)))
    assert one is not None
    assert cut is not None
    assert cut.layer_bytes == one.layer_bytes / 2
    assert cut.forward_s == pytest.approx(one.forward_s / 2)
    staged = plan(FULL, "training.activation_offload=1.0", "parallel.pp=4").activation_traffic
    assert staged is not None
    assert staged.layers == len(plan("parallel.pp=4").layout.stages[0]) - 2
    assert staged.layer_bytes == one.layer_bytes
    assert one.host_bytes == 15 * one.layer_bytes
    assert staged.host_bytes == 4 * staged.layers * staged.layer_bytes  # 4 are in flight at once
