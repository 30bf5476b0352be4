"""Gradients in host memory, from their reduction to the update of their parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from allometry.optim.offload.pieces import Piece
from allometry.parallel.buffers import host_buffer
from allometry.parallel.mesh import local


class HostGradients:
    """Host copies of gradients of ``parameters``, taken from ``device`` after the reduction.

    FSDP2 calls a parameter's hook with the reduced gradient, on the stream of the reduction. The
    hook adds the sum of earlier micro-batches, as FSDP2 would, computes the norm and enqueues the
    copy to the host, after which the memory is free. All arithmetic is thus the same as on the
    device, in the same order. The clipping factor is multiplied when a gradient is fetched for the
    update.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device) -> None:
        self._device = device
        self._homes: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}
        self._copied: dict[Tensor, torch.cuda.Event] = {}
        self._factor: Tensor | None = None
        for parameter in parameters:
            part = local(parameter.detach())
            buffer = host_buffer(part.nbytes, device)
            self._homes[parameter] = buffer.view(part.dtype).view(part.shape)
            hooks: Any = parameter
            hooks.register_post_accumulate_grad_hook(self._leave)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(home.nbytes for home in self._homes.values())

    def __contains__(self, parameter: Tensor) -> bool:
        """Return True if there is a gradient of this parameter."""
        return parameter in self._norms

    def clear(self) -> None:
        """Drop all gradients, as ``zero_grad`` does."""
        self._norms.clear()
        self._factor = None

    def norm(self, parameter: Tensor) -> Tensor:
        """Return the 2-norm of this rank's part, in fp32 or wider, 0-dim on the device."""
        self._await(parameter)
        return self._norms[parameter]

    def scale(self, factor: Tensor) -> None:
        """Make ``fetch`` return gradients times ``factor``, 0-dim on the device."""
        self._factor = factor

    def fetch(self, parameter: Tensor, piece: Piece | None = None) -> Tensor:
        """Return a device copy of this rank's part of a gradient, or of a piece of it."""
        self._await(parameter)
        home = self._homes[parameter]
        there = home if piece is None else piece.of(home)
        # A copy even on a CPU: the unscaled host tensor is read again.
        gradient = there.to(self._device, non_blocking=True, copy=True)
        if self._factor is not None:
            gradient.mul_(self._factor.to(gradient.dtype))
        return gradient

    def _await(self, parameter: Tensor) -> None:
        if parameter in self._copied:
            torch.cuda.current_stream(self._device).wait_event(self._copied[parameter])

    @torch.no_grad()
    def _leave(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, home = local(parameter.grad), self._homes[parameter]
        if parameter in self._norms:
            self._await(parameter)
            gradient += home.to(self._device, non_blocking=True)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        (self._norms[parameter],) = torch._foreach_norm([gradient], 2, dtype=wide)
        home.copy_(gradient, non_blocking=True)
        parameter.grad = None
        if self._device.type == "cuda":
            self._copied[parameter] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied[parameter].record(torch.cuda.current_stream(self._device))
