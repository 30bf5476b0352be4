"""Parameter groups of one rule and given gradients, for tests of update rules."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from allometry.optim.optimizer import RuleOptimizer
from allometry.scaling.update_rules import UPDATE_RULES

SHAPES = {"square": (16, 16), "tall": (30, 12), "wide": (12, 30), "row": (1, 20)}


def normal(key: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers that depend only on ``key`` and the position."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(normal(f"w {name}", size, dtype)) for name, size in shapes.items()}


def give(parameters: Mapping[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Set each parameter's gradient for this step."""
    for name, parameter in parameters.items():
        drawn = normal(f"g {name} {step}", tuple(parameter.shape), parameter.dtype)
        parameter.grad = drawn * scale


def group(rule: str, parameters: Mapping[str, nn.Parameter], **settings: Any) -> dict[str, Any]:
    """Return a group of this rule with its required settings; ``settings``
    override the defaults."""
    usual = {
        "lr": 0.02,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "betas": (0.9, 0.95),
        "momentum": 0.95,
        "nesterov": True,
        "step_norm": "frobenius",
        "adjust": "original",
        "rank": None,
        "scale": None if rule == "apollo_mini" else 1.0,
        "refresh_steps": 200,
        "norm_growth": 1.01,
        "seed": 0,
    }
    return {
        "params": list(parameters.values()),
        "param_names": list(parameters),
        "name": "hidden",
        "rule": rule,
        "sphere": UPDATE_RULES[rule].on_sphere,
        **usual,
        **settings,
    }


def optimizer(rule: str, parameters: Mapping[str, nn.Parameter], **settings: Any) -> RuleOptimizer:
    return RuleOptimizer([group(rule, parameters, **settings)])


def by_singular_values(
    matrix: Tensor, coefficients: tuple[tuple[float, float, float], ...]
) -> Tensor:
    """Apply the polynomials of Newton-Schulz iterations to the singular values of a matrix."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ v
