"""Communication in two halves, started and awaited separately, in forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.parallel.mesh import Axis

Start = Callable[[Tensor], Tensor]
"""Start a collective; the returned tensor is valid after torch's ``wait_tensor``."""


class InTwo:
    """Communication that ``send`` starts and ``arrive`` awaits.

    ``there`` starts the communication and ``back`` the gradient's communication, in the opposite
    direction. Both halves are autograd functions: autograd runs the backward of later calls first,
    so the backward of operators between the two forward calls overlaps with the communication. No
    existing tensor is modified, so selective checkpointing can save the result. An object is used
    once. A tensor that is sent must also be received if a block is recomputed. A tensor in flight
    has no autograd history, because a thread of the backend may be the last to release the tensor.
    For example::

        exchange = InTwo(start, start_backward)
        edge = exchange.send(x)
        y = independent(x)
        z = exchange.arrive(edge)
    """

    def __init__(self, there: Start, back: Start) -> None:
        self.there, self.back = there, back
        self.moving: tuple[Tensor, Tensor] | None = None  # sent tensor and tensor to be received

    def send(self, x: Tensor) -> Tensor:
        """Start the communication; return an empty tensor to pass to ``arrive``."""
        edge: Tensor = _Send.apply(x, self)
        return edge

    def arrive(self, edge: Tensor) -> Tensor:
        """Wait for the received tensor (on CUDA: order the current stream after its arrival)."""
        arrived: Tensor = _Arrive.apply(edge, self)
        return arrived

    def __call__(self, x: Tensor) -> Tensor:
        """Send and wait."""
        return self.arrive(self.send(x))

    def begin(self, start: Start, x: Tensor) -> Tensor:
        """Start on ``x``; return an empty tensor that carries the edge of the autograd graph."""
        x = x.detach().contiguous()
        self.moving = x, start(x)
        return x.new_empty(0)

    def end(self) -> Tensor:
        """Wait for the communication that ``begin`` started."""
        assert self.moving is not None
        kept, self.moving = self.moving, None
        arrived: Tensor = torch.ops._c10d_functional.wait_tensor(kept[1])
        return arrived.detach()


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, both: InTwo) -> Tensor:
        ctx.both = both
        return both.begin(both.there, x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.both.end(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, both: InTwo) -> Tensor:
        ctx.both = both
        return both.end()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.both.begin(ctx.both.back, grad), None


def under_way(moving: Tensor, axis: Axis) -> Tensor:
    """Return the result tensor of a collective over ``axis``, as required of a ``Start``.

    With gloo the collective is awaited here, so it does not overlap with computation: several
    collectives in flight damaged the heap, once in some hundred to thousand steps (torch 2.13; the
    cause is unknown, possibly a race as in github.com/pytorch/pytorch/issues/75529).
    """
    if moving.device.type == "cpu" and dist.get_backend(axis.group) != "fake":
        waited: Tensor = torch.ops._c10d_functional.wait_tensor(moving)
        return waited
    return moving
