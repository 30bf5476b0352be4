"""Clipping by the global gradient norm, over whole gradients and shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from allometry.parallel.mesh import Mesh

_Layout = tuple[DeviceMesh | None, tuple[int, ...]]


def _layout(gradient: Tensor) -> _Layout:
    """Return the mesh of a gradient and the mesh dimensions over which it is sharded."""
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in gradient.placements), (
        "a gradient must be reduced before its norm is taken",
        gradient.placements,
    )
    # What is neither partial nor replicated is sharded, in whichever order.
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
) -> Tensor:
    """Scale gradients so that their joint 2-norm is at most ``max_norm``; return the norm before.

    Each gradient is whole (a plain tensor, equal on all ranks of ``mesh.stage``) or a DTensor of
    some shards there; replicas count once, and ranks of a pipeline hold different parameters.
    ``mesh`` None: one process has them all. Every rank calls this with its parameters in the same
    order. It sends one message, to all ranks, in which the tensors ``along`` (float64) are summed
    in place as well.

    The result is a 0-dim float64 tensor on the gradients' device, bitwise equal on all ranks:
    squares are summed in float32 (float64 for float64 gradients) within a tensor, in float64
    between tensors and ranks. Nothing waits for the device. ``max_norm=None`` measures only;
    gradients below the limit, or of a norm that is not finite, are multiplied by exactly 1. As in
    torch, 1e-6 is added to the norm in the quotient. Parameters without gradient take no part.
    """
    layouts: dict[_Layout, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            layouts.setdefault(_layout(gradient), []).append(local)
    assert layouts, "no parameter has a gradient"
    device = next(iter(layouts.values()))[0].device
    holders = 1 if mesh is None else mesh.stage.size
    square = torch.zeros((), dtype=torch.float64, device=device)
    for (cut_over, sharded), gradients in layouts.items():
        shards = math.prod(cut_over.size(dim) for dim in sharded) if cut_over is not None else 1
        assert holders % shards == 0, (holders, shards)
        square += _sum_of_squares(gradients, device) / (holders // shards)  # each copy its part
    if mesh is not None:
        mesh.sum_together([square, *along])
    norm = square.sqrt()
    if max_norm is not None:
        # A norm that is not finite would spread to all gradients and hide where it came from.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)
        for gradients in layouts.values():
            for same in _by_dtype(gradients):
                torch._foreach_mul_(same, factor.to(same[0].dtype))
    return norm


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return Σx² as a 0-dim float64 tensor; empty shards add nothing."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for same in _by_dtype(tensors):
        wide = torch.promote_types(same[0].dtype, torch.float32)
        norms = torch._foreach_norm(same, 2, dtype=wide)
        total += torch.stack(list(norms)).double().square().sum()
    return total
