"""APOLLO: Adam-like scaling of each channel, from a projected gradient (arXiv 2412.05270)."""

# A rows, B columns of a matrix; r rank of the projection; n = min(A, B)

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allometry.optim.matrix_ops import Matrix, MatrixOps, one_by_one
from allometry.optim.states import Group, Item, State, count_step, init_steps
from allometry.scaling.update_rules import check_ranks, projection_rank

_LEAST = 1e-8  # added to norms in denominators


@dataclass(frozen=True, slots=True)
class Moments:
    """States of one matrix: Adam's moments of the projected gradient, and the update norm [].

    The projected gradient is [A, r] for a matrix with A >= B, else [r, B].
    """

    mean: Tensor
    square: Tensor
    norm: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, int], rank: int, like: Tensor) -> Moments:
        """Create zero states of a matrix of ``shape``, with the type and device of ``like``."""
        rows, columns = shape
        projected = (rows, rank) if rows >= columns else (rank, columns)
        mean = torch.zeros(projected, dtype=like.dtype, device=like.device)
        return cls(mean, torch.zeros_like(mean), torch.zeros_like(mean[0, 0]))


def init_states(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Create ``mean.I``, ``square.I``, ``norm.I`` of matrix I on its owner, and ``step``."""
    for matrix in ops.owned([item.parameter for item in items], apollo_cost):
        _make_moments(items[matrix.parameter], matrix.expert, state)
    init_steps(items, state)


def apollo(items: Sequence[Item], state: State, ops: MatrixOps) -> None:
    """Update ``items``, matrices or stacks of matrices, in place.

    W ← W − η·√(1−β₂ᵗ)/(1−β₁ᵗ)·scaled(G), then W ← W − ηλW; see ``scaled_gradient``. Groups of the
    rule ``apollo_mini`` use one scale for each matrix, rank 1, and a default ``scale`` of n/4.
    ``scaled_gradient`` needs unsharded matrices: gradients are sent to their owners and back in
    their own type, and only the owner stores the moments.
    """
    parameters = [item.parameter for item in items]
    steps = count_step(items, state)
    function = one_by_one(_function(items, steps, state))
    updates = ops.map(parameters, [item.gradient for item in items], function, apollo_cost)
    for item, update, step in zip(items, updates, steps, strict=True):
        (beta1, beta2), rate = item.group["betas"], item.group["lr"]
        corrected = rate * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        item.part.sub_(update, alpha=corrected)
        # After the step, as published: decay of the updated weight.
        item.part.mul_(1.0 - rate * item.group["weight_decay"])


def scaled_gradient(
    gradient: Tensor,
    projection: Tensor,
    moments: Moments,
    settings: Mapping[str, Any],
    *,
    first: bool,
) -> Tensor:
    """Return √scale·G·s of one unsharded matrix [A, B], with limited growth; update ``moments``.

    arXiv 2412.05270, Algorithm 1, as implemented in apollo-torch 1.0.3. ``projection`` P is [r, n]:
    R = GPᵀ if A >= B, else PG. R̃ = m/(√v + ε) with Adam's moments of R, without bias correction. s
    = ‖R̃‖/‖R‖ of each channel (over the r projected values), or of the matrix (``apollo_mini``). If
    the norm of the result exceeds ``norm_growth`` times the norm of the previous step, the result
    is scaled down to this limit. The limit does not apply in the first step, nor after a zero norm:
    with a limit of zero, a matrix without a gradient (behind a head of zeros, an expert without
    tokens) would never move again, which happens in the package. The previous norm is the last one
    that was not zero.

    ``settings``: ``rule``, ``betas``, ``eps``, ``scale``, ``norm_growth`` of the group.
    """
    rows, columns = gradient.shape
    tall = rows >= columns
    projected = gradient @ projection.T if tall else projection @ gradient
    beta1, beta2 = settings["betas"]
    moments.mean.mul_(beta1).add_(projected, alpha=1.0 - beta1)
    moments.square.mul_(beta2).addcmul_(projected, projected, value=1.0 - beta2)
    direction = moments.mean / moments.square.sqrt().add_(settings["eps"])
    if settings["rule"] == "apollo_mini":
        factor = direction.norm() / (projected.norm() + _LEAST)
    else:
        dim = 1 if tall else 0
        factor = direction.norm(dim=dim, keepdim=True)
        factor = factor / (projected.norm(dim=dim, keepdim=True) + _LEAST)
    scaled: Tensor = gradient * factor * math.sqrt(_scale(settings, min(rows, columns)))
    norm = scaled.norm()
    if not first:
        growth = settings["norm_growth"]
        limit = (norm / (moments.norm + _LEAST)).clamp(min=growth) / growth
        limit = limit.where(moments.norm > 0, 1.0)
        scaled = scaled / limit
        norm = norm / limit
    moments.norm.copy_(norm.where(norm > 0, moments.norm))
    return scaled


def projection(
    name: str, index: int, epoch: int, shape: tuple[int, int], seed: int, like: Tensor
) -> Tensor:
    """Return P [r, n] with elements N(0, 1/r), of the type and on the device of ``like``.

    P is drawn on demand from (seed, parameter name, matrix index, epoch) rather than stored, which
    would take as much memory as a moment. Devices draw different numbers.
    """
    text = f"apollo|{seed}|{name}|{index}|{epoch}"
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
    return drawn / math.sqrt(shape[0])


def rank_of(group: Mapping[str, Any], smaller: int) -> int:
    """Return the rank r for matrices with this smaller dimension.

    For example, ``rank: null`` of the rule ``apollo`` gives 256 for 1024.
    """
    return 1 if group["rule"] == "apollo_mini" else projection_rank(group["rank"], smaller)


def prepare_group(group: Group) -> None:
    """Raise UserError if the rank of the projection is too large to shrink the gradients."""
    if group["rule"] == "apollo":
        named = zip(group["param_names"], group["params"], strict=True)
        check_ranks(group["rank"], ((name, min(p.shape[-2:])) for name, p in named))


def apollo_cost(rows: int, columns: int) -> float:
    """Return the number of elements, which an owner receives, stores and multiplies."""
    return float(rows * columns)


def _scale(group: Mapping[str, Any], smaller: int) -> float:
    scale: float | None = group["scale"]
    return smaller / 4 if scale is None else scale


_KEYS = ("mean", "square", "norm")


def _make_moments(item: Item, index: int, state: State) -> None:
    held = state[item.parameter]
    if f"mean.{index}" not in held:
        rows, columns = item.parameter.shape[-2:]
        made = Moments.zeros((rows, columns), rank_of(item.group, min(rows, columns)), item.part)
        held.update({f"{key}.{index}": getattr(made, key) for key in _KEYS})


def _function(
    items: Sequence[Item], steps: Sequence[int], state: State
) -> Callable[[Tensor, Matrix], Tensor]:
    """Return the function that an owner applies to the unsharded gradient of a matrix."""

    def function(gradient: Tensor, matrix: Matrix) -> Tensor:
        item, before = items[matrix.parameter], steps[matrix.parameter] - 1
        held, group = state[item.parameter], item.group
        kept = [held[f"{key}.{matrix.expert}"] for key in _KEYS]
        # States of offloaded parameters are on the host, while the function runs on the device.
        moments = Moments(*(tensor.to(gradient.device) for tensor in kept))
        smaller = min(gradient.shape)
        drawn = projection(
            item.name,
            matrix.expert,
            before // group["refresh_steps"],
            (rank_of(group, smaller), smaller),
            group["seed"],
            gradient,
        )
        scaled = scaled_gradient(gradient, drawn, moments, group, first=before == 0)
        for tensor, key in zip(kept, _KEYS, strict=True):
            tensor.copy_(getattr(moments, key))
        return scaled

    return function
