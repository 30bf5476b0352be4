"""AdamH: Adam's direction on spheres, the rule of the head in HyperP (arXiv 2603.28743)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.sphere import init_radii, turn
from allometry.optim.states import (
    Item,
    State,
    count_step,
    init_like_parameters,
    init_steps,
    local_states,
)


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Make ``exp_avg`` and ``exp_avg_sq``, as the parameter; ``radius`` [M]; ``step``.

    Raises:
        UserError: see ``sphere.init_radii``.
    """
    init_like_parameters(items, state, "exp_avg", "exp_avg_sq")
    init_radii(items, state, ops)
    init_steps(items, state)


def adamh(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Take a step with ``items``, matrices or stacks of them, in place.

    U = m̂/(√v̂+ε) with Adam's moments of G, then each matrix turns by η towards −U
    (``sphere.turn``).
    """
    means, squares = (local_states(items, state, key) for key in ("exp_avg", "exp_avg_sq"))
    steps = count_step(items, state)
    directions = [
        adam_direction(item.gradient, mean, square, step, item.group["betas"], item.group["eps"])
        for item, mean, square, step in zip(items, means, squares, steps, strict=True)
    ]
    turn(items, directions, state, ops)


def adam_direction(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Return m̂/(√v̂+ε) of step ``step`` (from 1) and update the moments in place.

    arXiv 1412.6980, Algorithm 1; elementwise, so right on parts.
    """
    beta1, beta2 = betas
    mean.lerp_(gradient, 1.0 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    root = (square / (1.0 - beta2**step)).sqrt_().add_(eps)
    return torch.div(mean / (1.0 - beta1**step), root)
