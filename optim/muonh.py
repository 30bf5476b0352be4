"""MuonH: Muon's direction on spheres, the rule of hidden matrices in HyperP (arXiv 2603.28743)."""

from __future__ import annotations

from collections.abc import Sequence

from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.muon import orthogonalized, precision
from allometry.optim.newton_schulz import DION
from allometry.optim.sphere import init_radii, turn
from allometry.optim.states import (
    Item,
    State,
    count_step,
    init_like_parameters,
    rounded_at_random,
    updated,
)


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``momentum_buffer`` like the parameter, and ``radius`` [M].

    Raises:
        UserError: see ``sphere.init_radii``.
    """
    init_like_parameters(items, state, "momentum_buffer")
    init_radii(items, state, ops)


def muonh(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items``, matrices or stacks of matrices, in place.

    M ← μM + G; U = NS(G + μM) with Nesterov momentum, else NS(M), in bf16 with
    ``newton_schulz.DION``; then each matrix turns by η towards −U (``sphere.turn``). The update has
    no factor for shapes: η is relative, in the norm given by ``step_norm``.
    """
    count_step(rounded_at_random(items), state)
    dtype = precision(items)
    directions = []
    # One item at a time, so that only one direction exists in the wider type.
    for item in items:
        gradient, mu = item.gradient, item.group["momentum"]
        with updated(item, state, "momentum_buffer") as (momentum,):
            momentum.mul_(mu).add_(gradient)  # in turn, while in a CPU's cache
            look = gradient.add(momentum, alpha=mu) if item.group["nesterov"] else momentum
            directions.append(look.to(dtype))
    parameters = [item.parameter for item in items]
    orthogonal = orthogonalized(parameters, directions, DION, ops)
    full_rank = [item.group["step_norm"] == "spectral" for item in items]
    turn(items, orthogonal, state, ops, full_rank)
