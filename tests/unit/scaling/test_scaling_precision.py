"""The memory estimate of FP8 activations against the tensors that autograd saves."""

from typing import Any

import pytest
import torch

from allometry.configs.execution import Zero
from allometry.configs.model import DenseModel, MoEModel, StandardParameterization
from allometry.configs.precision import PrecisionConfig
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.precision import use_precision
from allometry.scaling.memory import COMPUTE_BYTES, FUSED_ATTENTION, estimate_memory
from allometry.scaling.parameterization import Parameterization

SHAPE = {"vocab_size": 64, "width": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "width": 96, "num_shared_experts": 1}
MODELS = {
    "dense": DenseModel.model_validate({**SHAPE, "ffn_width": 352}),
    "qk_norm": DenseModel.model_validate({**SHAPE, "ffn_width": 352, "qk_norm": True}),
    "moe": MoEModel.model_validate({**SHAPE, "experts": {"kind": "swiglu", **EXPERTS}}),
    "latent": MoEModel.model_validate(
        {**SHAPE, "experts": {"kind": "latent", "latent_width": 64, **EXPERTS}}
    ),
}


@pytest.mark.parametrize("saved", ["compute", "fp8"])
@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_near_what_autograd_keeps(
    name: str, compute_dtype: Any, saved: Any
) -> None:
    model = MODELS[name]
    rules = Parameterization(StandardParameterization(), model)
    module = build_model(model, rules, compute_dtype)
    initialize(module, rules, seed=0)
    use_precision(module, PrecisionConfig(saved_activations=saved))
    owned = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
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
        precision=PrecisionConfig(saved_activations=saved),
    )
    assert memory.activations == pytest.approx(measured, rel=0.06)


def moments(precision: PrecisionConfig, *, compiled: bool) -> dict[str, int]:
    memory = estimate_memory(
        MODELS["dense"],
        **{"micro_batch_tokens": 512, "compute_bytes": 2, "zero": Zero(stage=0), "hdp": 1},
        attention=FUSED_ATTENTION._replace(compiled=compiled),
        precision=precision,
    )
    found: dict[str, int] = {}
    for moment in memory.moments:
        found[moment.name] = max(found.get(moment.name, 0), moment.kinds.get("workspace", 0))
    return found


def test_rounding_in_parts_needs_copies_in_fp32() -> None:
    saved = PrecisionConfig(saved_activations="fp8")
    assert "forward" not in moments(PrecisionConfig(), compiled=False)
    assert "forward" not in moments(saved, compiled=True)
    # Gate and up unquantised and in three copies; the residual stream and its norm's output.
    bytes_of_token = (2 + 3 * 4) * 2 * 352 + 2 * 2 * 128
    assert moments(saved, compiled=False)["forward"] == 512 * bytes_of_token
    assert moments(saved, compiled=False)["backward"] > moments(saved, compiled=True)["backward"]
