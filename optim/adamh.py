"""AdamH: Adam's direction on spheres, the rule of the head in HyperP (arXiv 2603.28743)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.sphere import radii, turn
from allometry.optim.states import (
    Group,
    State,
    at_rest,
    count_step,
    items_of,
    like_parameters,
    steps_before,
)


def adamh(groups: Sequence[Group], state: State, ops: MatrixOps) -> None:
    """Take a step with all parameters of ``groups``, matrices or stacks of them, in place.

    U = m̂/(√v̂+ε) with Adam's moments of G, then each matrix turns by η towards −U
    (``sphere.turn``). State: ``exp_avg`` and ``exp_avg_sq``, as the parameter; ``radius`` [M];
    ``step``, a number on the host.

    Raises:
        UserError: see ``sphere.radii``.
    """
    items = items_of(groups)
    means, squares = (like_parameters(items, state, key) for key in ("exp_avg", "exp_avg_sq"))
    spheres = radii(items, state, ops)
    steps = steps_before(items, state)
    if at_rest(items):
        return
    count_step(items, state)
    directions = [
        adam_direction(
            item.gradient, mean, square, before + 1, item.group["betas"], item.group["eps"]
        )
        for item, mean, square, before in zip(items, means, squares, steps, strict=True)
    ]
    turn(items, directions, spheres, ops)


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
