"""The small modules: dtypes, rotary positions, norm."""

from __future__ import annotations

import pytest
import torch

from allometry.models.layers import Embedding, Linear, RMSNorm
from allometry.models.products import cast_once
from allometry.models.rotary import rotary_angles, rotate
from allometry.scaling.inventory import embedding as table
from allometry.scaling.inventory import matrix, vector
from allometry.scaling.roles import Role

HIDDEN, TABLE = matrix("weight", Role.HIDDEN, 3, 4), table("weight", 5, 4)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("module", [Linear(HIDDEN), Embedding(TABLE, torch.float32)])
def test_nothing_looks_alive_before_initialisation(module):
    assert module.weight.dtype == torch.float32
    assert module.weight.isnan().all()


def test_torch_recognises_the_layers():
    """Tensor-parallel styles accept only nn.Linear and nn.Embedding, and print them."""
    linear, embedding = Linear(HIDDEN), Embedding(TABLE, torch.float32)
    assert isinstance(linear, torch.nn.Linear)
    assert isinstance(embedding, torch.nn.Embedding)
    assert repr(linear) == "Linear(in_features=4, out_features=3, bias=False)"
    assert repr(embedding) == "Embedding(5, 4)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_weights_follow_the_activations(dtype):
    linear, norm = Linear(HIDDEN), RMSNorm(vector("weight", 4), 1e-5)
    embedding = Embedding(TABLE, dtype)
    for module in (linear, norm, embedding):
        torch.nn.init.normal_(module.weight)
    x = embedding(torch.arange(5))
    assert x.dtype == norm(x).dtype == linear(x).dtype == dtype
    expected = torch.nn.functional.linear(x, linear.weight.to(dtype))
    assert torch.equal(linear(x), expected)
    linear(x).sum().backward()
    assert linear.weight.grad.dtype == embedding.weight.grad.dtype == torch.float32


def test_a_weight_is_cast_once_and_gets_the_gradient_of_each_use():
    linear = Linear(HIDDEN)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(2, 5, 4).bfloat16()
    expected = torch.autograd.grad([linear(x[0]).sum(), linear(x[1]).sum()], linear.weight)[0]
    with cast_once(linear, torch.bfloat16):
        sums = [linear(part).sum() for part in x]
        assert linear.stacked.copy is not None
        for total in sums:  # one backward after another through the single cast
            total.backward()
    assert torch.equal(linear.weight.grad, expected)
    with torch.no_grad():
        linear.weight.zero_()
    assert not linear(x).any(), "afterwards a changed weight is seen"


def test_embedding_gradient_adds_up_in_fp32():
    embedding = Embedding(table("weight", 2, 4), torch.bfloat16)
    torch.nn.init.normal_(embedding.weight)
    embedding(torch.zeros(1000, dtype=torch.long)).sum().backward()
    # bf16 would stop at 256.
    assert (embedding.weight.grad[0] == 1000.0).all()


def test_norm_rounds_once_in_bf16():
    norm = RMSNorm(vector("weight", 384), 1e-5)
    torch.nn.init.normal_(norm.weight, 1.0, 0.1)
    x = (5.0 * torch.randn(64, 384)).bfloat16()
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = (exact * norm.weight.bfloat16().double()).bfloat16()
    # fp32 inside: only ties may round differently.
    assert (norm(x) != exact).float().mean() < 1e-3
    # The negative control: bf16 throughout shows an intermediate rounding.
    narrow = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.bfloat16()
    assert (narrow != exact).float().mean() > 0.1


def test_norm_in_fp64():
    norm = RMSNorm(vector("weight", 8), 0.5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8, dtype=torch.float64)
    exact = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), exact, rtol=1e-14, atol=1e-14)


def test_rotation_is_a_complex_product():
    x_BLNH = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions_BL = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1000, 7]])
    angles = rotary_angles(positions_BL, 8, 100.0, torch.float64)[:, :, None]
    got = rotate(x_BLNH, angles.cos(), angles.sin())
    # Pair i is (x[i], x[i + H/2]), rotated by position * theta^(-2i/H).
    pairs = torch.complex(x_BLNH[..., :4], x_BLNH[..., 4:])
    frequencies = torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turn = torch.exp(1j * positions_BL[:, :, None, None] * frequencies)
    expected = pairs * turn
    torch.testing.assert_close(got[..., :4], expected.real, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got[..., 4:], expected.imag, rtol=1e-13, atol=1e-13)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(query: int, key: int) -> float:
        angles = rotary_angles(torch.tensor([[query], [key]]), 16, 1e4, torch.float64)[:, :, None]
        turned_q = rotate(q, angles[:1].cos(), angles[:1].sin())
        turned_k = rotate(k, angles[1:].cos(), angles[1:].sin())
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(1005, 1000), rel=1e-10)
    assert score(9, 4) != pytest.approx(score(9, 5), rel=1e-3)


def test_rotation_stays_wide_in_bf16():
    x = torch.randn(1, 1, 2, 16).bfloat16()
    angles = rotary_angles(torch.tensor([[100_003]]), 16, 1e4, torch.bfloat16)
    assert angles.dtype == torch.float32
    got = rotate(x, angles.cos()[:, :, None], angles.sin()[:, :, None])
    exact = rotary_angles(torch.tensor([[100_003]]), 16, 1e4, torch.float64)[:, :, None]
    expected = rotate(x.double(), exact.cos(), exact.sin())
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().max() < 2e-2
