from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from allometry.configs.errors import UserError
from allometry.configs.model import (
    DenseModel,
    MaximalUpdateParameterization,
    StandardParameterization,
)
from allometry.configs.optimization import AdamW
from allometry.optim.build import build_optimizer, set_lr
from allometry.optim.groups import parameter_groups
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.roles import ParamSpec, Role

MODEL = DenseModel(vocab_size=12, width=16, num_layers=2, num_heads=2, ffn_width=24)
MUP = Parameterization(MaximalUpdateParameterization(base_width=4), MODEL)
SP = Parameterization(StandardParameterization(), MODEL)
SPECS = {spec.name: spec for spec in inventory(MODEL)}
CONFIG = AdamW(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.25)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(
            torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(dtype)
        )
        for name, spec in SPECS.items()
    }


def test_groups_hold_each_parameter_once_with_what_its_role_gets() -> None:
    named = parameters()
    groups = parameter_groups(named.items(), SPECS, MUP, CONFIG)
    assert [group["name"] for group in groups] == ["input", "vector", "hidden", "output"]
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(SPECS)
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            resolved = MUP.resolve(SPECS[name])
            assert parameter is named[name]
            assert group["role"] == SPECS[name].role.value
            assert group["lr"] == group["peak_lr"] == CONFIG.lr * resolved.lr
            assert group["weight_decay"] == CONFIG.weight_decay * resolved.weight_decay
            assert group["eps"] == CONFIG.eps * resolved.eps
    hidden = groups[2]
    assert (hidden["lr"], hidden["weight_decay"], hidden["eps"]) == (0.005, 1.0, 2.5e-7)


def test_sp_decays_matrices_alike_and_vectors_never() -> None:
    for group in parameter_groups(parameters().items(), SPECS, SP, CONFIG):
        assert group["weight_decay"] == (0.0 if group["role"] == "vector" else 0.25)
        assert group["lr"] == 0.02


def test_a_role_with_two_rules_makes_two_groups() -> None:
    class Uneven(Parameterization):
        def resolve(self, spec: ParamSpec):  # type: ignore[no-untyped-def]
            resolved = super().resolve(spec)
            scale = 0.5 if spec.name.startswith("blocks.1.") else 1.0
            return type(resolved)(
                resolved.init_kind,
                resolved.init_std,
                resolved.lr * scale,
                resolved.weight_decay,
                resolved.eps,
            )

    uneven = Uneven(StandardParameterization(), MODEL)
    names = [
        group["name"] for group in parameter_groups(parameters().items(), SPECS, uneven, CONFIG)
    ]
    assert names == ["input", "vector", "hidden", "vector-2", "hidden-2", "output"]


def test_unknown_and_absent_parameters_are_errors() -> None:
    named = parameters()
    with pytest.raises(UserError, match="parameter 'extra' has no role"):
        parameter_groups({**named, "extra": named["head.weight"]}.items(), SPECS, SP, CONFIG)
    del named["head.weight"]
    with pytest.raises(UserError, match=r"'head.weight' and 0 more declared parameters"):
        parameter_groups(named.items(), SPECS, SP, CONFIG)


def test_set_lr_scales_each_groups_own_peak() -> None:
    optimizer = build_optimizer(parameters().items(), SPECS, MUP, CONFIG)
    for fraction in (0.5, 0.25, 1.0):
        set_lr(optimizer, fraction)
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {
            "input": 0.02 * fraction,
            "vector": 0.02 * fraction,
            "hidden": 0.005 * fraction,
            "output": 0.02 * fraction,
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_adamw_written_out(dtype: torch.dtype) -> None:
    """The reference is Algorithm 2 of arXiv 1711.05101 with lr x decay, in float64."""
    named = parameters(dtype)
    start = {name: p.detach().double().clone() for name, p in named.items()}
    optimizer = build_optimizer(named.items(), SPECS, MUP, CONFIG)
    generator = torch.Generator().manual_seed(1)
    gradients = [
        {name: torch.randn(p.shape, generator=generator) * 1e-6 for name, p in named.items()}
        for _ in range(4)
    ]
    fractions = (0.5, 1.0, 1.0, 0.25)
    for fraction, step_gradients in zip(fractions, gradients, strict=True):
        for name, p in named.items():
            p.grad = step_gradients[name].to(dtype)
        set_lr(optimizer, fraction)
        optimizer.step()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for name, spec in SPECS.items():
        resolved = MUP.resolve(spec)
        w, m, v = start[name], torch.zeros_like(start[name]), torch.zeros_like(start[name])
        for t, fraction in enumerate(fractions, start=1):
            g = gradients[t - 1][name].double()
            lr = CONFIG.lr * resolved.lr * fraction
            w = w * (1 - lr * CONFIG.weight_decay * resolved.weight_decay)
            m = CONFIG.beta1 * m + (1 - CONFIG.beta1) * g
            v = CONFIG.beta2 * v + (1 - CONFIG.beta2) * g * g
            denominator = (v / (1 - CONFIG.beta2**t)).sqrt() + CONFIG.eps * resolved.eps
            w = w - lr * (m / (1 - CONFIG.beta1**t)) / denominator
        torch.testing.assert_close(named[name].detach().double(), w, rtol=tolerance, atol=tolerance)


def test_the_fused_kernel_is_used_and_names_survive_a_checkpoint() -> None:
    optimizer = build_optimizer(parameters().items(), SPECS, SP, CONFIG)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        assert group["fused"] is True
        assert math.isclose(group["peak_lr"], 0.02)
        assert {SPECS[name].role for name in group["param_names"]} == {Role(group["role"])}
    again = build_optimizer(parameters().items(), SPECS, SP, CONFIG)
    again.load_state_dict(state)
    assert [group["name"] for group in again.param_groups] == [
        group["name"] for group in optimizer.param_groups
    ]
