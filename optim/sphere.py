"""Rotation of matrices on spheres: each logical matrix keeps its initial Frobenius norm.

This is the update of HyperP (arXiv 2603.28743): the learning rate η is the step length relative to
the matrix, approximately the rotation angle. W' = W − η·R·U/‖U‖, then W = R·W'/‖W'‖.

Three choices differ from the published code (github.com/microsoft/ArchScale), which measures ‖W‖ in
each step, after weight decay, and treats a stack of experts as one tensor. Here R is measured once
and stored, so it does not drift or shrink. Weight decay on a sphere would only rescale η and is
rejected. Each expert has its own sphere.
"""

# M logical matrices of a parameter (see matrix_ops.py), R radius, U direction, η rate

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from allometry.configs.errors import UserError
from allometry.optim.matrix_ops import MatrixOps, products_of_parts
from allometry.optim.states import Item, State

_LEAST = 1e-12  # avoids division by zero; a zero direction leaves a matrix unchanged


def turned(
    weight: Tensor,
    direction: Tensor,
    radius: Tensor | float,
    rate: float,
    *,
    full_rank: bool = False,
) -> Tensor:
    """Return one rotated unsharded matrix [out, in]: reference implementation of ``turn``."""
    length = min(direction.shape) ** 0.5 if full_rank else direction.double().norm().clamp(_LEAST)
    moved = weight - rate * radius * (direction.to(weight.dtype) / length)
    turned: Tensor = radius * moved / moved.double().norm().clamp(min=_LEAST)
    return turned.to(weight.dtype)


def check_sphere(group: Mapping[str, Any]) -> None:
    """Raise UserError if a group has weight decay on a sphere."""
    assert group["sphere"], group["name"]
    if group["weight_decay"] != 0.0:
        raise UserError(
            f"weight_decay={group['weight_decay']} for {group['name']} matrices contradicts their "
            "fixed norm, on which it would only rescale the learning rate; set "
            "optimizer.weight_decay: 0"
        )


def init_radii(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create missing ``radius`` [M]: the current ‖W‖ of each logical matrix.

    Raises:
        UserError: a matrix of zeros, which could never turn.
    """
    new = [item for item in items if "radius" not in state[item.parameter]]
    if not new:
        return
    squares = ops.squared_norms([item.parameter for item in new], [item.part for item in new])
    for item, square in zip(new, squares, strict=True):
        radius = square.sqrt().to(item.part.dtype)
        # Values are read once per run, and only if tensors are not fake.
        if not isinstance(radius, FakeTensor) and not bool((radius > 0.0).all()):
            raise UserError(
                f"{item.name} begins with norm {radius.min().item():g}, and matrices of "
                f"optimizer rule {item.group['rule']} keep their initial norm; start it from "
                "random values or use another optimizer"
            )
        state[item.parameter]["radius"] = radius


def turn(
    items: Sequence[Item],
    directions: Sequence[Tensor],
    state: State,
    ops: MatrixOps,
    full_rank: Sequence[bool] | None = None,
) -> None:
    """Turn this rank's parts of parameters towards −``directions`` by their groups' learning rates.

    At learning rate 0 a matrix keeps its bits. With ``full_rank``, ‖U‖ is replaced by √min(out,
    in), the norm of an orthogonal U of full rank: the rate then fixes the singular values of the
    step, independent of their number.

    Uses one reduction of three numbers for each logical matrix. With s = ηR/‖U‖ the matrix W − sU
    has the norm √(‖W‖² − 2s⟨W, U⟩ + s²‖U‖²), about R(1 + η²/2), so W − sU need not be computed
    before it is rescaled: W ← aW − asU, where a is R divided by that norm.
    """
    parameters = [item.parameter for item in items]
    parts = [item.part for item in items]
    own = products_of_parts(parts, directions)
    sums = ops.sums(parameters * 3, [*own.xx, *own.xy, *own.yy])
    # All matrices of all parameters at once: on a CPU the overhead of small tensors dominates.
    wide = [state[parameter]["radius"].double() for parameter in parameters]
    counts = [len(radius) for radius in wide]
    radius_M = torch.cat(wide)
    stacked = any(item.stacked for item in items)
    if stacked:
        rates = [item.setting("lr") for item in items]
        per_M = [rate.flatten() for rate in rates if isinstance(rate, Tensor)]
        length_M = torch.cat(torch._foreach_mul(wide, per_M))
    else:
        length_M = torch.cat(torch._foreach_mul(wide, [item.group["lr"] for item in items]))
    ww_M, wu_M, uu_M = torch.cat(sums).view(3, -1)
    divisor_M = uu_M
    if full_rank is not None and any(full_rank):
        ranks = [float(min(parameter.shape[-2:])) for parameter in parameters]
        measured = uu_M.split(counts)
        whose = zip(measured, ranks, full_rank, strict=True)
        divisor_M = torch.cat([torch.full_like(x, n) if full else x for x, n, full in whose])
    step_M = length_M / divisor_M.sqrt().clamp(min=_LEAST)
    square_M = ww_M - 2.0 * step_M * wu_M + step_M.square() * uu_M
    keep_M = radius_M / square_M.clamp(min=0.0).sqrt().clamp(min=_LEAST)
    if stacked:
        keep_M = keep_M.where(length_M != 0.0, 1.0)
    keeps, moves = (ops.factors(parameters, x.split(counts)) for x in (keep_M, keep_M * step_M))
    for item, part, direction, keep, move in zip(
        items, parts, directions, keeps, moves, strict=True
    ):
        if item.stacked or item.group["lr"] != 0.0:
            part.mul_(keep).addcmul_(direction.to(part.dtype), move, value=-1.0)
