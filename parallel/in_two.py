"""Communication in two halves, begun and ended apart, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.parallel.mesh import Axis

Start = Callable[[Tensor], Tensor]
"""Begins to communicate; what it returns has values once torch's ``wait_tensor`` was called."""


class InTwo:
    """A communication that is begun by ``send`` and ended by ``arrive``.

    ``there`` begins it, ``back`` that of the gradient, which goes the other way. Two functions of
    autograd, so that what it runs between their backwards runs behind the communication: it takes
    what was called last first, thus all that was called between their forwards. Nothing is written
    into what is there already, so selective checkpointing can keep the result. To be used once.

    What is sent must arrive, also where a block is computed again, and a tensor in flight has no
    history of autograd: a thread of the backend may be the last to let go of it.
    """

    def __init__(self, there: Start, back: Start) -> None:
        self.there, self.back = there, back
        self.moving: tuple[Tensor, Tensor] | None = None  # what is sent and what will arrive

    def send(self, x: Tensor) -> Tensor:
        """Begin; the result is an empty tensor, for ``arrive`` alone."""
        edge: Tensor = _Send.apply(x, self)
        return edge

    def arrive(self, edge: Tensor) -> Tensor:
        """Wait for what was sent (on CUDA: order the stream after it)."""
        arrived: Tensor = _Arrive.apply(edge, self)
        return arrived

    def __call__(self, x: Tensor) -> Tensor:
        """Do both."""
        return self.arrive(self.send(x))

    def begin(self, start: Start, x: Tensor) -> Tensor:
        """Start on ``x``; an empty tensor like it, which carries the edge of autograd's graph."""
        x = x.detach().contiguous()
        self.moving = x, start(x)
        return x.new_empty(0)

    def end(self) -> Tensor:
        """Wait for what was begun."""
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
    """Return what a collective over ``axis`` fills, as a ``Start`` does.

    With gloo it is waited for here, so that nothing overlaps: with several collectives in flight
    the heap was damaged, once in some hundred to thousand steps (torch 2.13; the cause is not
    known, a race like that of github.com/pytorch/pytorch/issues/75529 is suspected).
    """
    if moving.device.type == "cpu" and dist.get_backend(axis.group) != "fake":
        waited: Tensor = torch.ops._c10d_functional.wait_tensor(moving)
        return waited
    return moving
