"""Mixtures of experts: parameter counts, saved tensors, and scaling of parameters."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch

from allometry.configs.execution import Zero
from allometry.configs.loader import load
from allometry.configs.model import (
    MaximalUpdateParameterization,
    MoEModel,
    StandardParameterization,
)
from allometry.models.build import build_model, torch_dtype
from allometry.models.init import initialize
from allometry.models.products import cast_once
from allometry.scaling.count import (
    active_numel,
    attention_flops,
    count_parameters,
    flops_per_token,
    layer_flops,
)
from allometry.scaling.inventory import inventory
from allometry.scaling.memory import COMPUTE_BYTES, FUSED_ATTENTION, estimate_memory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import MATRICES, Role

EXPERTS = {"kind": "swiglu", "num_experts": 8, "experts_per_token": 2, "width": 32}
LATENT = {**EXPERTS, "kind": "latent", "latent_width": 24, "num_shared_experts": 2}


def mixture(m: int = 1, **changes: Any) -> MoEModel:
    values: dict[str, Any] = {
        "vocab_size": 64,
        "width": 48 * m,
        "num_layers": 3,
        "num_heads": 3 * m,
        "first_dense_layers": 1,
        "ffn_width": 96 * m,
        "experts": {**EXPERTS, "width": 32 * m},
    }
    return MoEModel.model_validate({**values, **changes})


def test_inventory_of_a_mixture_by_hand() -> None:
    specs = {spec.name: spec for spec in inventory(mixture(experts=LATENT))}
    found = {
        name.removeprefix("blocks.1.ffn."): (spec.role.value, spec.shape, spec.fan_in, spec.fan_out)
        for name, spec in specs.items()
        if name.startswith("blocks.1.ffn.")
    }
    assert found == {
        "router.weight": ("router", (8, 48), 48, 8),
        "latent_down.weight": ("hidden", (24, 48), 48, 24),
        "experts.gate": ("expert_up", (8, 32, 24), 24, 32),
        "experts.up": ("expert_up", (8, 32, 24), 24, 32),
        "experts.down": ("expert_down", (8, 24, 32), 32, 24),
        "latent_up.weight": ("hidden", (48, 24), 24, 48),
        "shared.gate.weight": ("hidden", (64, 48), 48, 64),
        "shared.up.weight": ("hidden", (64, 48), 48, 64),
        "shared.down.weight": ("hidden", (48, 64), 64, 48),
    }
    assert specs["blocks.0.ffn.gate.weight"].shape == (96, 48)


def test_active_parameters_and_flops_by_hand() -> None:
    model = mixture()
    attention, expert = 4 * 48 * 48, 3 * 48 * 32
    mixed = attention + 8 * 48 + 8 * expert
    vectors = (2 * 3 + 1) * 48
    count = count_parameters(model)
    assert count.total == 2 * 64 * 48 + attention + 3 * 48 * 96 + 2 * mixed + vectors
    assert count.active == count.total - 2 * 6 * expert
    assert count.by_role["router"] == 2 * 8 * 48
    assert count.by_role["expert_down"] == 2 * 8 * expert // 3
    assert count.by_role["expert_up"] == 2 * count.by_role["expert_down"]
    scores = 2 * 48 * (10 + 1)
    layers = layer_flops(model, 10)
    assert layers[1] == 2 * (attention + 3 * 48 * 96) + scores
    assert layers[2] == layers[3] == 2 * (attention + 8 * 48 + 2 * expert) + scores
    assert sum(layers) == flops_per_token(model, 10).forward


def test_a_dense_models_parameters_are_all_active() -> None:
    model = load("preset:dense_25m").model
    count = count_parameters(model)
    assert count.active == count.total
    assert all(active_numel(model, spec) == spec.numel for spec in inventory(model))


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [
        ("moe_demo", 6_692_800, 3_153_856),
        ("moe_1b_a200m", 928_025_600, 198_216_704),
        # The same experts; 16 layers with routers 4 times as large, 2 projections and a norm more.
        ("moe_latent_1b", 928_025_600 + 11_538_432, 198_216_704 + 11_538_432),
        ("moe_ling_mini", 16_255_638_528, 1_432_968_192),
        ("moe_mixtral_8x7b", 46_702_792_704, 12_879_925_248),  # transformers' count
    ],
)
def test_presets_have_the_sizes_in_their_names(preset: str, total: int, active: int) -> None:
    model = load(f"preset:{preset}").model
    assert isinstance(model, MoEModel)
    count = count_parameters(model)
    assert (count.total, count.active) == (total, active)


def test_published_sizes_leave_multi_token_prediction_out() -> None:
    plain = load("preset:moe_ling_mini").model
    model = load("preset:moe_ling_mini_mtp").model
    assert model.multi_token is not None
    assert (model.multi_token.depth, model.multi_token.weight) == (1, 0.1)
    assert count_parameters(model) == count_parameters(plain)
    ahead = sum(spec.numel for spec in inventory(model) if spec.ahead)
    assert ahead == 827_861_248
    assert sum(spec.numel for spec in inventory(model)) == 16_255_638_528 + ahead
    D, block = 2048, 827_861_248 - 2 * 2048**2 - 3 * 2048
    assert block == sum(s.numel for s in inventory(plain) if s.name.startswith("blocks.19."))
    used = sum(
        active_numel(plain, s)
        for s in inventory(plain)
        if s.name.startswith("blocks.19.") and s.role in MATRICES
    )
    more = flops_per_token(model, 4096).forward - flops_per_token(plain, 4096).forward
    attention = attention_flops(plain, 4096)
    assert more == 4 * D**2 + 2 * used + attention + 2 * 157_184 * D


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", ["swiglu", "latent"])
def test_activations_are_near_what_autograd_keeps(compute_dtype: Any, form: str) -> None:
    router = {"gate": "sigmoid" if form == "latent" else "softmax", "normalize": True}
    model = mixture(
        width=128,
        num_heads=4,
        ffn_width=256,
        experts={**(EXPERTS if form == "swiglu" else LATENT), "width": 64, "num_experts": 16},
        router=router,
    )
    rules = Parameterization(StandardParameterization(), model)
    module = build_model(model, rules, compute_dtype)
    initialize(module, rules, seed=0)
    owned = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(64, (4, 128), generator=torch.Generator().manual_seed(0))
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


def test_a_gathered_block_is_the_largest_one() -> None:
    def copies(model: MoEModel) -> int:
        memory = estimate_memory(
            model, micro_batch_tokens=128, compute_bytes=2, zero=Zero(stage=3), hdp=2
        )
        return memory.compute_copies

    # Three blocks of experts, the router in fp32, without norm and head.
    block = 2 * (4 * 48 * 48 + 8 * 3 * 48 * 32 + 2 * 48) + 4 * 8 * 48
    assert copies(mixture()) == 3 * block + 2 * (64 * 48 + 48)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_mup_of_routers_and_experts(m: int) -> None:
    model = mixture(m)
    rules = Parameterization(MaximalUpdateParameterization(base_width=48), model)
    base = {spec.name: spec for spec in inventory(mixture())}
    standard = Parameterization(StandardParameterization(), model)
    for spec in inventory(model):
        if spec.role not in (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN):
            continue
        resolved = rules.resolve(spec)
        assert resolved.init_std == pytest.approx(base[spec.name].fan_in ** -0.5 / m**0.5)
        assert (resolved.lr, resolved.weight_decay, resolved.eps) == (1 / m, m, 1 / m)
        plain = standard.resolve(spec)
        assert (plain.lr, plain.weight_decay, plain.eps) == (1, 1, 1)
        assert plain.init_std == pytest.approx(spec.fan_in**-0.5)
        shown = json.loads(json.dumps(rules.describe()))["roles"][spec.role.value]
        assert shown == asdict(resolved)
        if m == 1:
            assert resolved == plain
