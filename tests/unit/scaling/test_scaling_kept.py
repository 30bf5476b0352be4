"""Memory estimate of a block with family options, against the bytes that autograd saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from allometry.configs.model import ModelConfig
from allometry.configs.precision import PrecisionConfig
from allometry.scaling.attention import AttentionCall
from allometry.scaling.memory import _kernels
from allometry.scaling.saved import Block
from kept import kept_of_block

B, L = 4, 64
SIZES = {"vocab_size": 64, "width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "ffn_width": 96},
    "moe": {
        "kind": "moe",
        "experts": {"kind": "swiglu", "num_experts": 8, "experts_per_token": 2, "width": 48},
    },
    "latent": {
        "kind": "moe",
        "experts": {
            "kind": "latent",
            "latent_width": 32,
            "num_experts": 8,
            "experts_per_token": 2,
            "width": 48,
            "norm": True,
        },
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "qkv_bias": {"qkv_bias": True},
    "qk_norm": {"qk_norm": True},
    "qk_norm and qkv_bias": {"qk_norm": True, "qkv_bias": True},
    "qk_norm over width": {"qk_norm": True, "qk_norm_over": "width"},
    "norms after": {"norms": "after", "qk_norm": True, "qk_norm_over": "width", "qkv_bias": True},
    "norms on both sides": {"norms": "both", "activation": "gelu_tanh", "qk_norm": True},
    "dropout": {"dropout": 0.1},
    "window": {"window": {"tokens": 16}},
}


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("options", "kind"),
    [(options, kind) for options in OPTIONS for kind in ("dense", "moe")] + [("none", "latent")],
)
def test_a_block_keeps_what_is_stated(options: str, kind: str, compute: str) -> None:
    values = SIZES | KINDS[kind] | OPTIONS[options]
    model: ModelConfig = TypeAdapter(ModelConfig).validate_python(values)
    call = AttentionCall(
        "cpu",
        compute,
        packed=False,
        length=L,
        compiled=False,
        head_width=model.head_width,
        window=model.window_tokens,
    )
    kernels = _kernels(model, 2 if compute == "bf16" else 4, call, None, PrecisionConfig(), B)
    stated = sum(Block(model, 0, kernels).saved(B * L, "none").values())
    tokens_BL = torch.zeros(B, L, dtype=torch.long)
    measured, of_gains = kept_of_block(model, compute, tokens_BL)
    assert stated == pytest.approx(measured - of_gains, rel=1e-3)
