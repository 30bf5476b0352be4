"""SGD-SaI, against its package and by hand."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch import nn

from allometry.optim.sgd_sai import signal_to_noise
from rule_groups import SHAPES, give, normal, optimizer, weights

STEPS = 20
WITH_VECTOR = {**SHAPES, "gain": (9,)}


def settings(**changes: float) -> dict[str, float]:
    return {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-8, **changes}


def test_twenty_steps_equal_the_package() -> None:
    package = pytest.importorskip("sgd_sai", reason="the package sgd-sai is not installed")
    start, ours, theirs, other = (weights(WITH_VECTOR) for _ in range(4))
    mine = optimizer("sgd_sai", ours, **settings(lr=1e-2))
    reference = package.SGD_sai(theirs.values(), **settings(lr=1e-2))
    control = optimizer("sgd_sai", other, **settings(lr=1e-2))
    for step in range(STEPS):
        for parameters in (ours, theirs):
            give(parameters, step, scale=1e-2)
        give(other, step + 1, scale=1e-2)  # another first gradient: another permanent scale
        with contextlib.redirect_stdout(io.StringIO()):  # it prints at its first step
            reference.step()
        mine.step()
        control.step()
    for name in WITH_VECTOR:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        assert float((theirs[name] - start[name]).detach().abs().max()) > 1e-2, "it moves"
        assert float((other[name] - theirs[name]).detach().abs().max()) > 1e-4, name


def test_steps_equal_the_rule_written_out() -> None:
    parameters = weights(WITH_VECTOR, torch.float64)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    momenta, rates = {}, {}
    mine = optimizer("sgd_sai", parameters, **settings())
    for step in range(5):
        give(parameters, step)
        mine.step()
        for name, p in parameters.items():
            if step == 0:
                rates[name] = p.grad.norm() / (p.grad.std() + 1e-8)
                momenta[name] = p.grad.clone()
            else:
                momenta[name] = 0.9 * momenta[name] + 0.1 * p.grad
            expected[name] = expected[name] * (1 - 1e-4) - 1e-3 * rates[name] * momenta[name]
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_the_scale_is_mostly_the_root_of_the_size() -> None:
    gradient = normal("g", (40, 50), torch.float64) + 0.5
    total, squares = gradient.sum().view(1), gradient.square().sum().view(1)
    found = signal_to_noise(total, squares, gradient.numel(), 0.0)
    ratio = float(gradient.mean() / gradient.std())
    assert float(found) == pytest.approx(2000**0.5 * (1 + ratio**2) ** 0.5, rel=1e-3)
    assert float(found) == pytest.approx(float(gradient.norm() / gradient.std()), rel=1e-12)
    one = torch.tensor([3.0], dtype=torch.float64)
    assert float(signal_to_noise(one, one.square(), 1, 0.5)) == 6.0, "one element has no deviation"


def test_what_has_no_gradient_at_first_is_not_frozen() -> None:
    """The published code would keep its scale at 0."""
    parameters = weights({"hidden": (4, 9), "experts": (2, 4, 9)})
    before = {name: p.detach().clone() for name, p in parameters.items()}
    mine = optimizer("sgd_sai", parameters, **settings(weight_decay=0.0))
    give(parameters, 0)
    parameters["hidden"].grad.zero_()
    parameters["experts"].grad[1] = 0.0
    mine.step()
    assert torch.equal(parameters["hidden"], before["hidden"])
    assert float(mine.state[parameters["hidden"]]["gsnr"]) == 6.0
    gsnr = mine.state[parameters["experts"]]["gsnr"]
    assert float(gsnr[1]) == 6.0
    assert float(gsnr[0]) != 6.0
    give(parameters, 1)
    mine.step()
    assert not torch.equal(parameters["hidden"], before["hidden"])
    assert not torch.equal(parameters["experts"][1], before["experts"][1])


def test_each_expert_has_a_scale_of_its_own() -> None:
    stack = weights({"experts": (3, 12, 8)})
    apart = {f"{e}": nn.Parameter(stack["experts"].detach()[e].clone()) for e in range(3)}
    ours = optimizer("sgd_sai", stack, **settings())
    theirs = optimizer("sgd_sai", apart, **settings())
    for step in range(3):
        give(stack, step)
        stack["experts"].grad[1] += 2.0
        for e, p in enumerate(apart.values()):
            p.grad = stack["experts"].grad[e].clone()
        ours.step()
        theirs.step()
    for e in range(3):
        torch.testing.assert_close(stack["experts"][e], apart[f"{e}"], rtol=1e-6, atol=1e-7)
