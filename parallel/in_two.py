"""Communication in two halves, begun and ended apart, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Start = Callable[[Tensor], Tensor]
"""Begins to communicate; what it returns has values once torch's ``wait_tensor`` was called."""


class InTwo:
    """A communication that is begun by ``send`` and ended by ``arrive``.

    ``there`` begins it, ``back`` that of the gradient, which goes the other way. Two functions of
    autograd, so that what it runs between their backwards runs behind the communication: it takes
    what was called last first, thus all that was called between their forwards. Nothing is written
    into what is there already, so selective checkpointing can keep the result. To be used once.
    """

    def __init__(self, there: Start, back: Start) -> None:
        self.there, self.back = there, back
        self.returning: Tensor | None = None  # the gradient under way

    def send(self, x: Tensor) -> Tensor:
        """Begin; the result is for ``arrive`` alone, and only there it has values."""
        moving: Tensor = _Send.apply(x, self)
        return moving

    def arrive(self, moving: Tensor) -> Tensor:
        """Wait for what was sent (on CUDA: order the stream after it)."""
        arrived: Tensor = _Arrive.apply(moving, self)
        return arrived

    def __call__(self, x: Tensor) -> Tensor:
        """Do both."""
        return self.arrive(self.send(x))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, both: InTwo) -> Tensor:
        ctx.both = both
        return both.there(x.contiguous())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        moving, ctx.both.returning = ctx.both.returning, None
        return torch.ops._c10d_functional.wait_tensor(moving), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, moving: Tensor, both: InTwo) -> Tensor:
        ctx.both = both
        return torch.ops._c10d_functional.wait_tensor(moving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.both.returning = ctx.both.back(grad.contiguous())
        return grad, None  # of the size that autograd expects; nobody reads it
