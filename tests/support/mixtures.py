"""Small mixture-of-experts models in several forms, and a training step, for tests of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allometry.configs.model import MoEModel, StandardParameterization
from allometry.models.build import build_model
from allometry.models.init import initialize
from allometry.models.moe import begin_step, routers
from allometry.models.transformer import Transformer
from allometry.scaling.parameterization import Parameterization

B, L, V, E, K = 2, 16, 61, 4, 2
SMALL = {
    "vocab_size": V,
    "width": 24,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "first_dense_layers": 1,
    "ffn_width": 40,
    "experts": {"kind": "swiglu", "num_experts": E, "experts_per_token": K, "width": 16},
}
LATENT = {"kind": "latent", "num_experts": E, "experts_per_token": K, "width": 16} | {
    "latent_width": 8,
    "num_shared_experts": 2,
}
SHARED = {**SMALL["experts"], "num_shared_experts": 2}
FORMS = {
    "plain": {},
    "shared": {"experts": SHARED, "router": {"gate": "sigmoid", "normalize": True, "scale": 2.5}},
    "latent": {"experts": LATENT, "router": {"balance": {"kind": "bias"}}},
    "normed": {"experts": LATENT | {"norm": True}, "router": {"scale": 1.5}},
    "sqrt": {"experts": SHARED, "router": {"gate": "sqrt", "scale": 1.5, "z_loss": 1e-3}},
    "sqrt alone": {"router": {"gate": "sqrt"}},
}


def described(form: str = "plain", **changes: Any) -> MoEModel:
    return MoEModel.model_validate({**SMALL, **FORMS[form], **changes})


def sp(model: MoEModel) -> Parameterization:
    return Parameterization(StandardParameterization(), model)


def small(form: str = "plain", dtype: str = "fp64", **changes: Any) -> Transformer:
    config = described(form, **changes)
    model = build_model(config, sp(config), dtype)
    initialize(model, sp(config), seed=0)
    begin_step(model, B * L)
    skewed = torch.arange(1.0, config.experts.num_experts + 1)
    for router in routers(model).values():  # with even loads the auxiliary loss has no gradient
        router.load.copy_(skewed / skewed.sum())
    return model.double() if dtype == "fp64" else model


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(V, (B, L), generator=torch.Generator().manual_seed(seed))


def train(model: Transformer, pieces: int = 1) -> dict[str, Tensor]:
    """Return the gradients of one step over the batch in ``pieces`` micro-batches."""
    model.zero_grad()
    for some, targets in zip(tokens().chunk(pieces), tokens(1).chunk(pieces), strict=True):
        (model(some, targets).total / (B * L)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, one in first.items():
        difference = (one - second[name]).abs().max()
        assert difference <= tolerance * max(one.abs().max(), 1e-3), name
