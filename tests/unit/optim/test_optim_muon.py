"""Newton-Schulz and Muon, against torch's and the original package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from allometry.optim import newton_schulz as products
from allometry.optim.muon import adjustment
from allometry.optim.newton_schulz import DION, MUON, newton_schulz, newton_schulz_cost
from rule_groups import SHAPES, by_singular_values, give, normal, optimizer, weights

STEPS = 5


@pytest.mark.parametrize("coefficients", [MUON, DION])
@pytest.mark.parametrize("name", SHAPES)
def test_newton_schulz_acts_on_singular_values(name: str, coefficients: Any) -> None:
    matrix = normal(name, SHAPES[name], torch.float64)
    before = matrix.clone()
    found = newton_schulz(matrix, coefficients, dtype=torch.float64)
    torch.testing.assert_close(found, by_singular_values(matrix, coefficients), rtol=0, atol=1e-12)
    assert torch.equal(matrix, before), "the argument is left alone"
    scaled = newton_schulz(matrix * 1e3, coefficients, dtype=torch.float64)
    torch.testing.assert_close(found, scaled, rtol=0, atol=1e-12)


def test_dions_coefficients_are_close_to_orthogonal_and_muons_less() -> None:
    values = {
        name: torch.linalg.svdvals(
            newton_schulz(normal("x", (64, 96), torch.float64), coefficients, dtype=torch.float64)
        )
        for name, coefficients in (("dion", DION), ("muon", MUON))
    }
    assert float(values["dion"].min()) > 0.97
    assert float(values["dion"].max()) < 1.04
    assert float(values["muon"].min()) < 0.9, "the two are told apart"


def test_newton_schulz_of_zeros_is_zeros_and_bf16_input_is_kept() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 4), DION), torch.zeros(3, 4).bfloat16())
    matrix = normal("x", (8, 12)).bfloat16()
    before = matrix.clone()
    assert newton_schulz(matrix, DION).dtype == torch.bfloat16
    assert torch.equal(matrix, before)


def test_costs_of_tall_and_wide_are_the_same() -> None:
    assert newton_schulz_cost(3, 7) == newton_schulz_cost(7, 3) == 9 * 17


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torch_bit_by_bit(
    adjust: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "in_fp32", lambda *_: False)
    ours, theirs = weights(SHAPES), weights(SHAPES)
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    mine = optimizer("muon", ours, adjust=adjust, **settings)
    reference = torch.optim.Muon(theirs.values(), adjust_lr_fn=adjust, **settings)
    for step in range(STEPS):
        give(ours, step)
        give(theirs, step)
        mine.step()
        reference.step()
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("shape", [(8, 12), (96, 64), (128, 128)])
def test_products_in_fp32_are_as_exact_as_those_in_bf16(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = normal("x", shape)
    exact = newton_schulz(matrix.double(), DION, dtype=torch.float64)
    errors = {}
    for wide in (True, False):
        monkeypatch.setattr(products, "in_fp32", lambda *_, wide=wide: wide)
        found = newton_schulz(matrix, DION)
        assert found.dtype == torch.bfloat16
        errors[wide] = float((found.double() - exact).norm() / exact.norm())
    assert errors[True] == pytest.approx(errors[False], rel=0.02)
    assert 1e-3 < errors[True] < 1e-2, "each product is rounded to bf16"


def test_unadjusted_is_torch_where_the_adjustment_is_one() -> None:
    flat = {name: shape for name, shape in SHAPES.items() if shape[0] <= shape[1]}
    ours, theirs = weights(flat), weights(flat)
    mine = optimizer("muon", ours, adjust="none")
    reference = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.0)
    give(ours, 0)
    give(theirs, 0)
    mine.step()
    reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in flat)
    assert (adjustment("none", 30, 12), adjustment("original", 48, 12)) == (1.0, 2.0)
    assert adjustment("match_rms_adamw", 9, 16) == pytest.approx(0.8)


def test_equals_the_original_package_within_bf16() -> None:
    package = pytest.importorskip("muon", reason="the package muon-optimizer is not installed")
    start, ours, theirs = (weights(SHAPES) for _ in range(3))
    mine = optimizer("muon", ours, weight_decay=0.1)
    reference = package.SingleDeviceMuon(list(theirs.values()), lr=0.02, weight_decay=0.1)
    plain = {name: nn.Parameter(p.detach().clone()) for name, p in start.items()}
    without = optimizer("muon", plain, weight_decay=0.1, nesterov=False)
    for step in range(STEPS):
        for parameters in (ours, theirs, plain):
            give(parameters, step)
        for each in (mine, reference, without):
            each.step()
    for name in SHAPES:
        expected = theirs[name].detach()
        assert float((ours[name].detach() - expected).abs().max()) < 2e-3, name
        moved = (expected - start[name].detach()).norm()
        assert float((ours[name].detach() - expected).norm() / moved) < 0.03, name
        assert float((plain[name].detach() - expected).norm() / moved) > 0.1, name


def test_equals_muon_written_out() -> None:
    """With exact singular values instead of iterations, in float64."""
    parameters = weights(SHAPES, torch.float64)
    expected = {name: p.detach().clone() for name, p in parameters.items()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    mine = optimizer("muon", parameters, weight_decay=0.1, adjust="none")
    for step in range(STEPS):
        give(parameters, step)
        mine.step()
        for name, p in parameters.items():
            momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
            direction = by_singular_values(0.95 * momenta[name] + 0.05 * p.grad, MUON)
            expected[name] = expected[name] * (1 - 0.02 * 0.1) - 0.02 * direction
    for name, p in parameters.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-12)


def test_each_expert_of_a_stack_is_a_matrix_of_its_own() -> None:
    stack = weights({"experts": (3, 12, 8)})
    apart = {f"{e}": nn.Parameter(stack["experts"].detach()[e].clone()) for e in range(3)}
    ours, theirs = optimizer("muon", stack), optimizer("muon", apart)
    for step in range(STEPS):
        give(stack, step)
        stack["experts"].grad[1] *= 1e3  # one orthogonalization of all would suppress the others
        for e, p in enumerate(apart.values()):
            p.grad = stack["experts"].grad[e].clone()
        ours.step()
        theirs.step()
    assert all(torch.equal(stack["experts"][e], apart[f"{e}"]) for e in range(3))
