"""Muon: orthogonalized momentum (K. Jordan, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.newton_schulz import MUON, Coefficients, newton_schulz_cost, orthogonal
from allometry.optim.states import (
    Item,
    State,
    count_step,
    descend_,
    init_like_parameters,
    rounded_at_random,
    updated,
)


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``momentum_buffer`` like the parameter."""
    init_like_parameters(items, state, "momentum_buffer")


def muon(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items``, matrices or stacks of matrices, in place.

    M ← μM + (1−μ)G; U = μM + (1−μ)G with Nesterov momentum, else M; W ← (1−ηλ)W − ηs·NS(U). NS runs
    in bf16 with ``newton_schulz.MUON``, and s is ``adjustment``. For each matrix the update equals
    torch.optim.Muon.
    """
    count_step(rounded_at_random(items), state)
    dtype = precision(items)
    directions = []
    for item in items:
        gradient, mu = item.gradient, item.group["momentum"]
        with updated(item, state, "momentum_buffer") as (momentum,):
            momentum.lerp_(gradient, 1.0 - mu)
            look = gradient.lerp(momentum, mu) if item.group["nesterov"] else momentum
            directions.append(look.to(dtype))
    parameters = [item.parameter for item in items]
    for item, update in zip(items, orthogonalized(parameters, directions, MUON, ops), strict=True):
        descend_(item, update, adjustment(item.group["adjust"], *item.parameter.shape[-2:]))


def adjustment(kind: str, rows: int, columns: int) -> float:
    """Return the scale factor of an orthogonal update [rows, columns].

    ``original``: √max(1, rows/columns), Jordan's. ``match_rms_adamw``: 0.2·√max(rows, columns), so
    that elements are as large as AdamW's (arXiv 2502.16982, eq. 4). ``none``: 1. For example,
    ``adjustment("original", 400, 100)`` is 2.
    """
    match kind:
        case "none":
            return 1.0
        case "original":
            return math.sqrt(max(1.0, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case _:
            raise AssertionError(kind)


def orthogonalized(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    coefficients: tuple[Coefficients, ...],
    ops: MatrixOps,
) -> list[Tensor]:
    """Return this rank's parts of NS of each logical matrix, in the directions' type."""
    function = partial(orthogonal, coefficients=coefficients)
    return ops.map(parameters, directions, function, newton_schulz_cost)


def precision(items: Sequence[Item]) -> torch.dtype:
    """Return the type for communication and orthogonalization: bf16, or float64 for float64."""
    dtypes = {item.parameter.dtype for item in items}
    return torch.float64 if dtypes == {torch.float64} else torch.bfloat16
