"""Lion: the sign of a momentum (arXiv 2302.06675, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.states import Item, State, init_like_parameters, local_states


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``exp_avg`` like the parameter."""
    init_like_parameters(items, state, "exp_avg")


def lion(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items`` in place; elementwise.

    W ← (1−ηλ)W − η·sign(β₁M + (1−β₁)G), then M ← β₂M + (1−β₂)G. An element moves by η for any size
    of its gradient, as with Adam, so learning rates scale with model size as Adam's do:
    ``Rates.ADAM`` in every parameterization. Elements that never had a gradient only decay: sign(0)
    = 0.
    """
    for item, momentum in zip(items, local_states(items, state, "exp_avg"), strict=True):
        (beta1, beta2), rate = item.group["betas"], item.group["lr"]
        part, gradient = item.part, item.gradient
        update = momentum.lerp(gradient, 1.0 - beta1).sign_()
        part.mul_(1.0 - rate * item.group["weight_decay"]).add_(update, alpha=-rate)
        momentum.lerp_(gradient, 1.0 - beta2)
