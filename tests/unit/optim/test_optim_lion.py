"""Lion, against its published algorithm."""

from __future__ import annotations

import pytest
import torch

from allometry.configs.model import MaximalUpdateParameterization
from allometry.configs.optimization import Lion
from allometry.optim.build import build_optimizer, set_lr
from allometry.scaling.inventory import inventory
from allometry.scaling.parameterization import Parameterization
from mixtures import described
from rule_groups import SHAPES, give, optimizer, weights

WITH_VECTOR_AND_EXPERTS = {**SHAPES, "gain": (9,), "experts": (3, 12, 8)}


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98)])
def test_steps_equal_the_algorithm_written_out(betas: tuple[float, float]) -> None:
    """Algorithm 2 of arXiv 2302.06675, in float64."""
    lr, decay = 0.01, 0.3
    parameters, other = (weights(WITH_VECTOR_AND_EXPERTS, torch.float64) for _ in range(2))
    start = {name: p.detach().clone() for name, p in parameters.items()}
    expected = {name: value.clone() for name, value in start.items()}
    momenta = {name: torch.zeros_like(value) for name, value in start.items()}
    ours = optimizer("lion", parameters, lr=lr, weight_decay=decay, betas=betas)
    swapped = optimizer("lion", other, lr=lr, weight_decay=decay, betas=betas[::-1])
    for step in range(8):
        give(parameters, step)
        give(other, step)
        ours.step()
        swapped.step()
        for name, p in parameters.items():
            assert p.grad is not None
            interpolated = betas[0] * momenta[name] + (1 - betas[0]) * p.grad
            expected[name] -= lr * (interpolated.sign() + decay * expected[name])
            momenta[name] = betas[1] * momenta[name] + (1 - betas[1]) * p.grad
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.state[p]["exp_avg"], momenta[name], rtol=1e-12, atol=1e-12)
        assert float((other[name] - p).detach().abs().max()) > lr, f"control: {name}"


def test_only_signs_count() -> None:
    one, other = (weights(SHAPES, torch.float64) for _ in range(2))
    first, second = optimizer("lion", one), optimizer("lion", other)
    give(one, 0)
    give(other, 0, scale=1e6)
    first.step()
    second.step()
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)
    empty = weights({"rows": (4, 6)})
    before = empty["rows"].detach().clone()
    give(empty, 0)
    assert empty["rows"].grad is not None
    empty["rows"].grad[1] = 0.0
    optimizer("lion", empty, lr=0.5).step()
    moved = (empty["rows"] - before).detach().abs()
    assert torch.equal(moved[1], torch.zeros(6)), "without a gradient it stays"
    torch.testing.assert_close(moved[2], torch.full((6,), 0.5))


def test_groups_are_those_of_the_parameterization() -> None:
    model = described(first_dense_layers=1)
    specs = {spec.name: spec for spec in inventory(model)}
    config = Lion(lr=0.02, weight_decay=0.5)
    rules = Parameterization(
        MaximalUpdateParameterization(base_width=model.width // 2), model, config
    )
    parameters = weights({name: spec.shape for name, spec in specs.items()})
    made = build_optimizer(parameters.items(), specs, rules, config)
    set_lr(made, 0.5)
    for group in made.param_groups:
        narrower = group["role"] in ("hidden", "router", "expert_up", "expert_down")
        assert group["lr"] == (0.005 if narrower else 0.01)
        decay = 0.0 if group["role"] == "vector" else 1.0 if narrower else 0.5
        assert group["weight_decay"] == decay
        assert group["betas"] == (0.9, 0.99)
        assert "eps" not in group
