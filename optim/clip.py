"""Gradient clipping by global norm, for unsharded and sharded gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from allometry.parallel.mesh import Mesh, local


class Away(Protocol):
    """Gradients that are not stored with their parameters (``offload/gradients.py``)."""

    def __contains__(self, parameter: Tensor) -> bool:
        """Return True if there is a gradient of this parameter."""

    def norm(self, parameter: Tensor) -> Tensor:
        """Return the 2-norm of this rank's part, in fp32 or wider, 0-dim on the device."""

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients by a 0-dim tensor at their next access."""


class _Part(NamedTuple):
    """This rank's part of a gradient, or only its norm if the gradient is offloaded."""

    dtype: torch.dtype
    here: Tensor | None
    norm: Tensor | None


_Layout = tuple[DeviceMesh | None, tuple[int, ...]]


def _layout(gradient: Tensor) -> _Layout:
    """Return the mesh of a gradient and the mesh dimensions over which it is sharded."""
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in gradient.placements), (
        "a gradient must be reduced before its norm is taken",
        gradient.placements,
    )
    # Placements that are neither partial nor replicated are shards, in any order.
    sharded = tuple(
        dim for dim, placement in enumerate(gradient.placements) if not placement.is_replicate()
    )
    return gradient.device_mesh, sharded


@torch.no_grad()
def clip_by_global_norm(
    parameters: Iterable[Tensor],
    max_norm: float | None,
    mesh: Mesh | None = None,
    along: Sequence[Tensor] = (),
    away: Away | None = None,
) -> Tensor:
    """Scale gradients to a joint 2-norm of at most ``max_norm``; return the norm before clipping.

    A gradient is unsharded (a plain tensor, equal on all ranks of ``mesh.stage``) or a DTensor
    sharded over these ranks. Replicas count once, and pipeline ranks have different parameters.
    ``mesh`` None: a single process. Every rank calls this function with its parameters in the same
    order. The function sends one message, to all ranks, which also sums the tensors ``along``
    (float64) in place.

    The result is a 0-dim float64 tensor on the gradients' device, bitwise equal on all ranks:
    squares are summed in float32 (float64 for float64 gradients) within a tensor, and in float64
    between tensors and ranks. The host does not wait for the device. ``max_norm=None`` only
    measures. Gradients below the limit, or with a norm that is not finite, are multiplied by
    exactly 1. As in torch, 1e-6 is added to the norm in the quotient. For example, norm 4 and
    ``max_norm=1`` give a factor of about 0.25. Parameters without a gradient are skipped. Gradients
    in ``away`` count with the layout of their parameter. A rank of ``mesh`` whose parameters are
    all frozen has no gradients.
    """
    layouts: dict[_Layout, list[_Part]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            here = local(gradient)
            layouts.setdefault(_layout(gradient), []).append(_Part(here.dtype, here, None))
        elif away is not None and parameter in away:
            norm = away.norm(parameter)
            layouts.setdefault(_layout(parameter), []).append(_Part(parameter.dtype, None, norm))
    if layouts:
        first = next(iter(layouts.values()))[0]
        some = first.norm if first.here is None else first.here
        assert some is not None
        device = some.device
    else:
        assert mesh is not None, "no parameter has a gradient"
        device = mesh.device
    holders = 1 if mesh is None else mesh.stage.size
    square = torch.zeros((), dtype=torch.float64, device=device)
    for (cut_over, sharded), parts in layouts.items():
        shards = math.prod(cut_over.size(dim) for dim in sharded) if cut_over is not None else 1
        assert holders % shards == 0, (holders, shards)
        square += _sum_of_squares(parts, device) / (holders // shards)  # each replica its share
    if mesh is not None:
        mesh.sum_together([square, *along])
    norm = square.sqrt()
    if max_norm is not None:
        factor = clip_factor(norm, max_norm)
        for parts in layouts.values():
            for dtype, same in _by_dtype(parts).items():
                gradients = [part.here for part in same if part.here is not None]
                if gradients:
                    torch._foreach_mul_(gradients, factor.to(dtype))
        if away is not None:
            away.scale(factor)
    return norm


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the clipping factor of gradients with global norm ``norm``; 1 if it is not finite.

    For example, norm 4 and ``max_norm=1`` give about 0.25.
    """
    # A factor that is not finite would spread to all gradients and hide its origin.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)


def _by_dtype(parts: Sequence[_Part]) -> dict[torch.dtype, list[_Part]]:
    groups: dict[torch.dtype, list[_Part]] = {}
    for part in parts:
        groups.setdefault(part.dtype, []).append(part)
    return groups


def _sum_of_squares(parts: Sequence[_Part], device: torch.device) -> Tensor:
    """Return Σx² as a 0-dim float64 tensor; empty shards contribute 0."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for dtype, same in _by_dtype(parts).items():
        here = [part.here for part in same if part.here is not None]
        wide = torch.promote_types(dtype, torch.float32)
        norms = iter(torch._foreach_norm(here, 2, dtype=wide) if here else ())
        in_order = [next(norms) if part.norm is None else part.norm for part in same]
        total += torch.stack(in_order).double().square().sum()
    return total
