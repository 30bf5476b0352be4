from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.execution import Zero
from allometry.configs.loader import load
from allometry.configs.model import DenseModel, StandardParameterization
from allometry.configs.run import RunConfig
from allometry.models.build import build_model, torch_dtype
from allometry.models.products import cast_once
from allometry.scaling.count import count_parameters
from allometry.scaling.inventory import inventory
from allometry.scaling.layout import Layout
from allometry.scaling.memory import COMPUTE_BYTES, FUSED_ATTENTION, MemoryEstimate, estimate_memory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.plan import RunPlan
from allometry.scaling.shards import zero_dim

MODEL = {
    "kind": "dense",
    "vocab_size": 8192,
    "width": 384,
    "num_layers": 8,
    "num_heads": 6,
    "ffn_width": 1536,
}


def run_config(**sections: Any) -> RunConfig:
    values = {
        "run": {"folder": "somewhere"},
        "model": MODEL,
        "data": {"sequence_length": 512, "sources": [{"name": "a", "train": "a"}]},
        "batch": {"sequences": 32, "micro_batch_sequences": 4},
        "training": {"total_tokens": 1_000_000},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "constant", "warmup_tokens": 20_000},
    }
    return RunConfig.model_validate({**values, **sections})


def test_plan_of_a_run() -> None:
    config = run_config()
    plan = RunPlan.of(config, world_size=4)
    assert plan.hdp == 4
    assert plan.total_steps == 62  # 1e6 / 16384 = 61.04, rounded up to full steps
    assert plan.total_tokens == 62 * 32 * 512
    assert plan.warmup_steps == 2
    assert plan.micro_batches(1) == 2
    assert plan.parameters == count_parameters(config.model)
    assert plan.total_flops == plan.total_tokens * plan.flops_per_token.total
    described = json.loads(json.dumps(plan.describe()))
    assert described["total_tokens"] == plan.total_tokens
    assert described["memory_bytes_per_rank"]["total"] == plan.memory.total


def test_the_plan_says_which_documents_its_flops_are_of() -> None:
    source = {"sequence_length": 512, "sources": [{"name": "a", "train": "a"}]}
    for data, said in (
        ({"packing": "per_document"}, "one document of 512 tokens, an upper bound"),
        ({"packing": "concatenated"}, "attends as a whole, 512 tokens"),
        ({"kind": "documents", "max_document_tokens": 2048}, "as long as a window, 512 tokens"),
    ):
        batch = {"sequences": 32, "micro_batch_sequences": 1}
        plan = RunPlan.of(run_config(data={**source, **data}, batch=batch), world_size=1)
        assert said in plan.describe()["flops_assumption"]


def test_the_batch_and_the_ranks_must_fit() -> None:
    with pytest.raises(UserError, match=r"batch.sequences=32 .*; use batch.sequences=24 or 36"):
        RunPlan.of(run_config(), world_size=3)
    with pytest.raises(UserError, match=r"parallel.hdp=8 .* needs 8 ranks, but there are 4"):
        RunPlan.of(run_config(parallel={"hdp": 8}), world_size=4)


def test_micro_batches_follow_the_ramp() -> None:
    ramp = {"start_sequences": 8, "increment_sequences": 8, "over_tokens": 512 * 48}
    config = run_config(batch={"sequences": 32, "micro_batch_sequences": 4, "ramp": ramp})
    plan = RunPlan.of(config, world_size=2)
    assert [plan.micro_batches(step) for step in range(1, 6)] == [1, 1, 2, 3, 4]


def estimate(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "micro_batch_tokens": 2048,
        "compute_bytes": 2,
        "zero": Zero(stage=0),
        "hdp": 1,
    }
    return estimate_memory(DenseModel.model_validate(MODEL), **{**values, **changes})


def test_zero_divides_what_each_stage_says() -> None:
    parameters = count_parameters(DenseModel.model_validate(MODEL)).total
    whole, share = 4 * parameters, parameters  # 4 bytes each; a quarter of them on 4 ranks
    assert parameters % 4 == 0
    unit = 8192 * 384 + 384  # the head and the final norm; a block has fewer
    bucket, one = 2**20, (2 + 4) * unit
    for stage, micro_batches, held, reduction in (
        (0, 1, whole, bucket),
        (1, 1, share, one),
        (1, 2, share, whole - share + 4 * unit),
        (2, 2, share, one),
        (3, 2, share, one),
    ):
        memory = estimate(zero=Zero(stage=stage, bucket_mib=1), hdp=4, micro_batches=micro_batches)
        assert (memory.parameters, memory.gradients, memory.reduction) == (held, held, reduction)
        steps = 4 * len(inventory(DenseModel.model_validate(MODEL)))
        assert memory.optimizer_states == 2 * held + steps
    offloaded = estimate(zero=Zero(stage=1, offload="cpu"), hdp=4, micro_batches=2)
    assert (offloaded.parameters, offloaded.gradients, offloaded.optimizer_states) == (0, 0, 0)
    assert offloaded.reduction == whole + 4 * unit
    single = estimate()
    assert single.reduction == 0
    assert single.total == max(sum(moment.kinds.values()) for moment in single.moments)


def test_experts_that_ranks_do_not_divide_are_cut_in_another_dimension() -> None:
    assert zero_dim((8, 96, 64), 8) == zero_dim((16, 3, 5), 8) == 0
    assert zero_dim((4, 96, 64), 8) == zero_dim((12, 96, 64), 8) == 1
    assert zero_dim((4, 90, 64), 8) == 2
    assert zero_dim((4, 90, 60), 8) == 0  # padded: FSDP2 shards no other dimension unevenly
    assert zero_dim((3, 64), 8) == zero_dim((3,), 8) == 0


def at_head(memory: MemoryEstimate) -> int:
    return next(moment for moment in memory.moments if moment.name == "head").kinds["loss"]


def test_a_pipeline_keeps_one_gradient_of_the_head_for_all_micro_batches_in_flight() -> None:
    def last(schedule: str, number: int) -> Any:
        pipeline = {"pp": 2, "pipeline": {"schedule": schedule}}
        layout = Layout.of(run_config(parallel=pipeline), 2)
        return estimate(layout=layout, micro_batches=number, pp_rank=1)

    inputs = 2 * 2048 * 384
    one = last("1f1b", 8)
    assert at_head(last("gpipe", 8)) == at_head(one) + 7 * inputs
    assert last("gpipe", 8).activations == 8 * one.activations


def test_copies_and_loss_by_hand() -> None:
    memory = estimate(logits_chunk_tokens=1024)
    inputs, head = 2 * 2048 * 384, 8192 * 384
    # Logits and their softmax in fp32, plus the head's gradient of the previous chunk.
    assert at_head(memory) == (2 + 4) * 1024 * 8192 + 4 * head + inputs
    assert at_head(estimate(logits_chunk_tokens=4096)) == (2 + 4) * 2048 * 8192 + inputs
    assert estimate(compute_bytes=4).compute_copies == 0
    block = 4 * 384**2 + 3 * 384 * 1536
    assert memory.compute_copies == 2 * (8 * block + 8192 * 384)
    # Sharded: all gathered, norms too, the embedding in fp32; at stage 3 norm and head, the
    # embedding or a block, and two blocks ahead.
    gathered = estimate(zero=Zero(stage=1), hdp=2)
    norms, table = 2 * 17 * 384, 4 * 8192 * 384
    assert gathered.compute_copies == memory.compute_copies + norms + table
    assert estimate(zero=Zero(stage=3, regather="step"), hdp=2).compute_copies == (
        gathered.compute_copies
    )
    sharded = estimate(zero=Zero(stage=3), hdp=2)
    head = 2 * (8192 * 384 + 384)
    assert sharded.compute_copies == head + table + 2 * 2 * (block + 2 * 384)


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_activations_are_near_what_autograd_keeps(compute_dtype: Any, qk_norm: bool) -> None:
    shape = {**MODEL, "width": 128, "num_layers": 3, "num_heads": 4, "ffn_width": 352}
    model = DenseModel.model_validate(
        {**shape, "num_kv_heads": 2, "vocab_size": 64, "qk_norm": qk_norm}
    )
    module = build_model(model, Parameterization(StandardParameterization(), model), compute_dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.01)
    owned = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(4, 128, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with cast_once(module, torch_dtype(compute_dtype)), hooks:
        module(tokens, tokens)
    measured = sum(
        tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in owned
    )
    memory = estimate_memory(
        model,
        micro_batch_tokens=tokens.numel(),
        compute_bytes=COMPUTE_BYTES[compute_dtype],
        zero=Zero(stage=0),
        hdp=1,
        attention=FUSED_ATTENTION._replace(device="cpu"),
    )
    assert memory.activations + memory.compute_copies == pytest.approx(measured, rel=0.1)


def test_estimate_is_near_what_a_gpu_needed() -> None:
    """dense_1b in bf16 without compilation, 8 x 4096 tokens: 67.8 GiB on an H100 (2026-11-23)."""
    plan = load("preset:dense_1b", ["parallel.zero.stage=0", "batch.micro_batch_sequences=8"])
    assert RunPlan.of(plan, 1).memory.total / 2**30 == pytest.approx(67.8, rel=0.15)


def test_planning_needs_no_torch() -> None:
    modules = [
        "scaling.plan",
        "scaling.parameterization",
        "optim.schedule",
        "laws.runs",
        "laws.areas",
    ]
    imports = "; ".join(f"import allometry.{module}" for module in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
