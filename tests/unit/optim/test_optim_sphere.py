"""MuonH and AdamH: rotation of the weights, step length, and invariants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from allometry.configs.errors import UserError
from allometry.optim import muonh
from allometry.optim.newton_schulz import DION
from allometry.optim.sphere import turned
from rule_groups import SHAPES, by_singular_values, give, normal, optimizer, weights

STEPS = 5
SIDES = {"out": 8, "in": 24}
ON_SPHERES = ["muonh", "adamh"]


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_a_step_is_as_long_as_the_rate_says(rule: str) -> None:
    """It equals, or nearly equals, a chord of the sphere after a step along its tangent."""
    parameters = weights({"big": (64, 96), "experts": (2, 96, 128)})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    give(parameters, 0)
    optimizer(rule, parameters, lr=0.02).step()
    for name, p in parameters.items():
        dims = (-2, -1)
        relative = (p - before[name]).norm(dim=dims) / before[name].norm(dim=dims)
        torch.testing.assert_close(relative, torch.full_like(relative, 0.02), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_the_norm_stays_for_a_thousand_steps(rule: str) -> None:
    parameters = weights({"matrix": (12, 20)})
    radius = float(parameters["matrix"].detach().double().norm())
    mine = optimizer(rule, parameters, lr=0.02)
    worst = 0.0
    for step in range(1000):
        parameters["matrix"].grad = normal(f"{step % 7} {step}", (12, 20))
        mine.step()
        worst = max(worst, abs(float(parameters["matrix"].detach().double().norm()) / radius - 1))
    assert 0.0 < worst < 5e-7


def tangent(weight: Tensor, direction: Tensor) -> Tensor:
    return direction - weight * (weight * direction).sum() / weight.square().sum()


@pytest.mark.parametrize("rate", [0.02, 0.01])
def test_a_turn_leaves_the_tangent_by_half_the_rate(rate: float) -> None:
    weight = normal("w", (24, 40), torch.float64)
    direction = tangent(weight, normal("u", (24, 40), torch.float64))
    change = turned(weight, direction, weight.norm(), rate) - weight
    cosine = (change * weight).sum() / (change.norm() * weight.norm())
    assert float(cosine) == pytest.approx(-rate / 2, rel=1e-2)


@pytest.mark.parametrize("rate", [0.02, 0.01])
def test_weight_decay_would_only_rescale_the_rate(rate: float) -> None:
    """By ηλ of the step; if R were computed after the decay, the sphere would
    shrink by ηλ instead."""
    weight, direction = (normal(key, (24, 40), torch.float64) for key in "wu")
    direction = tangent(weight, direction)
    radius, decay = weight.norm(), 0.1
    plain = turned(weight, direction, radius, rate)
    decayed = turned(weight * (1 - rate * decay), direction, radius, rate)
    effect = (decayed - plain).norm() / (plain - weight).norm()
    assert float(effect) == pytest.approx(rate * decay, rel=2e-2)
    assert float(decayed.norm()) == pytest.approx(float(radius), rel=1e-12)
    same = turned(weight * (1 - rate * decay), direction, radius, rate * (1 - rate * decay))
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-12)


def muonh_direction(gradients: list[Tensor], nesterov: bool) -> Tensor:
    momentum = torch.zeros_like(gradients[0])
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
    return by_singular_values(gradients[-1] + 0.95 * momentum if nesterov else momentum, DION)


def adam_direction(gradients: list[Tensor]) -> Tensor:
    mean, square = (torch.zeros_like(gradients[0]) for _ in range(2))
    for gradient in gradients:
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
    t = len(gradients)
    return mean / (1 - 0.9**t) / ((square / (1 - 0.95**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("form", ["muonh", "muonh without nesterov", "muonh spectral", "adamh"])
def test_steps_equal_the_rule_written_out(form: str) -> None:
    """In float64, with exact singular values instead of iterations."""
    rule = "adamh" if form == "adamh" else "muonh"
    parameters = weights(SHAPES, torch.float64)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    radius = {name: p.norm() for name, p in expected.items()}
    given: dict[str, list[Tensor]] = {name: [] for name in SHAPES}
    mine = optimizer(
        rule,
        parameters,
        nesterov=form != "muonh without nesterov",
        step_norm="spectral" if form == "muonh spectral" else "frobenius",
    )
    for step in range(STEPS):
        give(parameters, step, scale=1e-3)
        mine.step()
        for name, p in parameters.items():
            given[name].append(p.grad.clone())
            direction = (
                adam_direction(given[name])
                if form == "adamh"
                else muonh_direction(given[name], form != "muonh without nesterov")
            )
            full = min(p.shape) ** 0.5
            length = full if form == "muonh spectral" else direction.norm()
            moved = expected[name] - 0.02 * radius[name] * direction / length
            expected[name] = radius[name] * moved / moved.norm()
    for name, p in parameters.items():
        error = (p.detach() - expected[name]).norm() / radius[name]
        assert float(error) < 1e-12, name


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_how_far_a_gradient_of_low_rank_turns(norm: str) -> None:
    """Rotation by a gradient of rank 2 in a matrix of 8. With the Frobenius norm each of its two
    directions moves twice as far as with full rank; with singular values equally far, and the step
    has half the length."""
    changes = {}
    for rank in (2, 8):
        parameters = {"w": torch.nn.Parameter(normal("w", (8, 24)).double())}
        before = parameters["w"].detach().clone()
        left, right = (normal(f"{side} {rank}", (n, rank)).double() for side, n in SIDES.items())
        parameters["w"].grad = left.mul(1e-3) @ right.T
        optimizer("muonh", parameters, step_norm=norm).step()
        changes[rank] = (parameters["w"].detach() - before) / before.norm()
    longest = {rank: float(torch.linalg.matrix_norm(c, 2)) for rank, c in changes.items()}
    length = {rank: float(c.norm()) for rank, c in changes.items()}
    assert length[8] == pytest.approx(0.02, rel=2e-2)
    relative = (length[2] / length[8], longest[2] / longest[8])
    assert relative == pytest.approx((1.0, 2.0) if norm == "frobenius" else (0.5, 1.0), rel=0.05)


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_float32_is_near_float64(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 throughout, which rounds less than the bf16 of Newton-Schulz."""
    monkeypatch.setattr(muonh, "precision", lambda items: items[0].parameter.dtype)
    narrow, wide = weights(SHAPES), weights(SHAPES, torch.float64)
    for name, p in wide.items():
        p.data.copy_(narrow[name].detach())
    made = [optimizer(rule, p) for p in (narrow, wide)]
    for step in range(STEPS):
        give(narrow, step)
        for name, p in wide.items():
            p.grad = narrow[name].grad.double()
        for each in made:
            each.step()
    for name in SHAPES:
        error = (narrow[name].detach().double() - wide[name].detach()).norm() / wide[name].norm()
        assert float(error.detach()) < 1e-6, name


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_experts_have_spheres_of_their_own(rule: str) -> None:
    stack = weights({"experts": (3, 12, 8)})
    with torch.no_grad():
        stack["experts"][2] *= 5.0
    norms = stack["experts"].detach().norm(dim=(1, 2))
    apart = {f"{e}": nn.Parameter(stack["experts"].detach()[e].clone()) for e in range(3)}
    ours, theirs = optimizer(rule, stack), optimizer(rule, apart)
    for step in range(STEPS):
        give(stack, step)
        stack["experts"].grad[1] *= 1e3
        for e, p in enumerate(apart.values()):
            p.grad = stack["experts"].grad[e].clone()
        ours.step()
        theirs.step()
    for e in range(3):
        torch.testing.assert_close(stack["experts"][e], apart[f"{e}"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(stack["experts"].norm(dim=(1, 2)), norms, rtol=1e-6, atol=0)
    assert mine_radius(ours, stack["experts"]).shape == (3,)


def mine_radius(made: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    found: Tensor = made.state[parameter]["radius"]
    return found


def test_negative_control_one_sphere_for_a_stack_moves_experts_differently() -> None:
    stack = normal("w", (3, 12, 8), torch.float64)
    direction = normal("u", (3, 12, 8), torch.float64)
    direction[1] *= 1e3
    together = turned(stack.flatten(0, 1), direction.flatten(0, 1), stack.norm(), 0.02)
    together = together.view_as(stack)
    apart = turned(stack[0], direction[0], stack[0].norm(), 0.02)
    assert float((together[0] - apart).norm() / (apart - stack[0]).norm()) > 0.5
    assert float((together[1].norm() / stack[1].norm() - 1).abs()) > 1e-4


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_a_gradient_of_zeros_turns_nothing(rule: str) -> None:
    parameters = weights(SHAPES)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    give(parameters, 0, scale=0.0)
    optimizer(rule, parameters).step()
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", ON_SPHERES)
def test_decay_on_a_sphere_and_a_matrix_of_zeros_are_errors(rule: str) -> None:
    with pytest.raises(UserError, match=r"weight_decay=0.1 for hidden matrices contradicts"):
        optimizer(rule, weights(SHAPES), weight_decay=0.1)
    parameters = weights({"one": (3, 4), "experts": (2, 3, 4)})
    with torch.no_grad():
        parameters["experts"][1] = 0.0
    give(parameters, 0)
    made = optimizer(rule, parameters)
    with pytest.raises(UserError, match="experts begins with norm 0"):
        made.step()
