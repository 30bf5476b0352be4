"""Check that the tensors of a checkpoint are finite."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh, local
from allometry.trainer.state.planners import State

_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def not_finite(state: State, mesh: Mesh) -> str | None:
    """Return the name of a tensor with an infinity or NaN on any rank, the same on all ranks.

    None if all tensors are finite, among those in memory with a floating-point type of 16 bits or
    more (this includes the scales of FP8 states). This check covers the last update, which the loss
    and gradients would show only in the next step.
    """
    named = [(name, _part(each)) for name, each in state.items()]
    floats = [(name, part) for name, part in named if part is not None and part.dtype in _TYPES]
    found = None
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, part in floats:
        by_device.setdefault(part.device, []).append((name, part.isfinite().all()))
    for flags in by_device.values():
        fine = torch.stack([flag for _, flag in flags]).tolist()
        found = found or next(
            (name for (name, _), good in zip(flags, fine, strict=True) if not good), None
        )
    return next((name for name in mesh.gather_objects(found) if name is not None), None)


def check_finite(path: Path, state: State, mesh: Mesh) -> None:
    """Raise UserError on every rank if a tensor loaded from ``path`` is not finite."""
    name = not_finite(state, mesh)
    if name is not None:
        raise UserError(
            f"checkpoint {path}: {name} is not finite, so no step can follow; go back to an "
            "earlier one with run.resume=step-N"
        )


def _part(value: object) -> Tensor | None:
    return local(value) if isinstance(value, Tensor) else None
