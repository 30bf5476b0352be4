"""Small loss computation and the quantities to compare."""

from __future__ import annotations

import torch
from torch import Tensor

from allometry.models.loss import IGNORE


def example(dtype: torch.dtype, tokens: int = 37, ignored: int = 5) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    x_TD = torch.randn(tokens, 16, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(61, 16, generator=generator, dtype=torch.float64) / 4
    targets_T = torch.randint(61, (tokens,), generator=generator)
    targets_T[:ignored] = IGNORE
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def results(loss, x, weight, targets, **options):
    total, nll_T = loss(x, weight, targets, **options)
    # A factor, because the caller divides by the global count.
    grads = torch.autograd.grad(total * 0.3, (x, weight))
    return total.detach(), nll_T, *grads


def relative(some: Tensor, other: Tensor) -> float:
    return float((some - other).abs().max() / other.abs().max())
