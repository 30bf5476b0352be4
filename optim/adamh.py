"""AdamH: Adam's direction on spheres, the rule of the head in HyperP (arXiv 2603.28743)."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.optim.adam import adam_direction
from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.sphere import init_radii, turn
from allometry.optim.states import (
    Item,
    State,
    count_step,
    init_like_parameters,
    init_steps,
    updated,
)


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``exp_avg`` and ``exp_avg_sq`` like the parameter, ``radius`` [M], and ``step``.

    Raises:
        UserError: see ``sphere.init_radii``.
    """
    init_like_parameters(items, state, "exp_avg", "exp_avg_sq")
    init_radii(items, state, ops)
    init_steps(items, state)


def adamh(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items``, matrices or stacks of matrices, in place.

    U = m̂/(√v̂+ε) with Adam's moments of G; then each matrix turns by η towards −U
    (``sphere.turn``).
    """
    directions = []
    for item, step in zip(items, count_step(items, state), strict=True):
        with updated(item, state, "exp_avg", "exp_avg_sq") as (mean, square):
            betas, eps = item.group["betas"], item.group["eps"]
            direction = adam_direction(item.gradient, mean, square, step, betas, eps)
        directions.append(direction)
    turn(items, directions, state, ops)
