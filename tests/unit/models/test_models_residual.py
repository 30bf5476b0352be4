"""Both branches of a block are multiplied by the parameterization's residual scale."""

from typing import Any

import pytest
import torch

from allometry.configs.model import CompleteP, DenseModel, ModelConfig, MoEModel
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.transformer import Block
from allometry.scaling.parameterization import Parameterization

COMMON = {"vocab_size": 31, "width": 16, "num_layers": 3, "num_heads": 2, "ffn_width": 24}
EXPERTS = {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 12}
DENSE = DenseModel.model_validate(COMMON | {"kind": "dense"})
MOE = MoEModel.model_validate(COMMON | {"kind": "moe", "ffn_width": None, "experts": EXPERTS})


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_blocks_scale_both_branches(config: ModelConfig) -> None:
    rules = CompleteP(base_width=16, base_layers=1)
    parameterization = Parameterization(rules, config)
    scale = parameterization.forward.residual
    assert abs(scale - 1) > 0.1, "a scale of 1 would show nothing"
    model = build_model(config, parameterization, "fp64").double()
    initialize(model, parameterization, seed=0)
    seen: list[tuple[Any, ...]] = []
    block = model.blocks["1"]
    assert isinstance(block, Block)
    block.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output[0])))
    model(torch.arange(14).view(2, 7) * 5 % 31)
    ((x_BLD, geometry, y_BLD),) = seen

    def branch(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    attended_BLD = x_BLD + scale * block.attention(block.attention_norm(x_BLD), geometry)
    wanted_BLD = attended_BLD + scale * branch(block.ffn(block.ffn_norm(attended_BLD)))
    torch.testing.assert_close(y_BLD, wanted_BLD, rtol=1e-12, atol=1e-12)
