"""Parameters with gradients of several shapes, and their global norm."""

from __future__ import annotations

import torch
from torch import nn


def with_gradients(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((5, 3), (7,), (4, 4), (1,)):
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = gradient.to(dtype)
        made.append(parameter)
    return made


def joint_norm(parameters: list[nn.Parameter]) -> float:
    gradients = [p.grad.double().flatten() for p in parameters if p.grad is not None]
    return float(torch.cat(gradients).norm())
