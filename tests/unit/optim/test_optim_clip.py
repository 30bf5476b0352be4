from __future__ import annotations

import pytest
import torch
from torch import nn

from allometry.optim.clip import clip_by_global_norm
from clipping import joint_norm, with_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clips_to_the_limit(dtype: torch.dtype) -> None:
    parameters = with_gradients(dtype)
    before = joint_norm(parameters)
    expected = [p.grad.double() * (0.5 / before) for p in parameters if p.grad is not None]
    norm = clip_by_global_norm(parameters, 0.5)
    assert norm.dtype == torch.float64
    assert norm.ndim == 0
    assert float(norm) == pytest.approx(before, rel=1e-6)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 3e-6, torch.float64: 1e-6}[dtype]
    for parameter, clipped in zip(parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), clipped, rtol=tolerance, atol=tolerance * 1e-2
        )


def test_below_the_limit_and_without_one_nothing_changes() -> None:
    for limit in (1e3, None):
        parameters, original = with_gradients(), with_gradients()
        norm = clip_by_global_norm(parameters, limit)
        assert float(norm) == pytest.approx(joint_norm(original), rel=1e-6)
        for parameter, other in zip(parameters, original, strict=True):
            assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_small_and_many_gradients_do_not_vanish() -> None:
    # In bf16 a sum of squares stalls at 256 terms of one; it needs a wider dtype.
    parameter = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert float(clip_by_global_norm([parameter], None)) == pytest.approx(100_000**0.5, rel=1e-6)
    tiny = with_gradients(scale=1e-18)
    assert float(clip_by_global_norm(tiny, None)) == pytest.approx(joint_norm(tiny), rel=1e-5)


def test_parameters_without_gradient_take_no_part() -> None:
    parameters = with_gradients()
    norm = clip_by_global_norm([nn.Parameter(torch.ones(3)), *parameters], None)
    assert float(norm) == pytest.approx(joint_norm(parameters), rel=1e-6)
    with pytest.raises(AssertionError, match="no parameter has a gradient"):
        clip_by_global_norm([nn.Parameter(torch.ones(3))], 1.0)


def test_a_bad_gradient_shows_in_the_norm() -> None:
    parameters = with_gradients()
    parameters[0].grad[0, 0] = float("nan")  # type: ignore[index]
    assert torch.isnan(clip_by_global_norm(parameters, 1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_norm_that_is_not_finite_changes_no_gradient(bad: float) -> None:
    """One bad gradient must not spread to all, and must show its origin."""
    parameters, original = with_gradients(scale=10.0), with_gradients(scale=10.0)
    for each in (parameters, original):
        each[1].grad[3] = bad  # type: ignore[index]
    norm = clip_by_global_norm(parameters, 0.5)
    assert not torch.isfinite(norm)
    for parameter, other in zip(parameters, original, strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=0, equal_nan=True)
