"""Adam's update direction, shared by several rules."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_direction(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Return m̂/(√v̂+ε) of step ``step`` (from 1) and update the moments in place.

    arXiv 1412.6980, Algorithm 1; elementwise, so correct on shards.
    """
    beta1, beta2 = betas
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = (square / (1.0 - beta2**step)).sqrt_().add_(eps)
    return torch.div(mean / (1.0 - beta1**step), root)
