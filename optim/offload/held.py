"""Tensors that live in homes: how rules, checkpoints and working copies see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from allometry.optim.offload.pieces import Piece
from allometry.optim.offload.stream import Home
from allometry.parallel.deepspeed.boxes import Stretch
from allometry.parallel.mesh import local


class Stored(NamedTuple):
    """A state between steps: ``like`` has its shape, type and layout, and no memory of its own.

    ``read`` returns this rank's part on the host, and ``write`` replaces it; of a ``Stretch`` in
    one dimension.
    """

    like: Tensor | Stretch
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


class WorkingCopy(Protocol):
    """What is computed with of a parameter whose fp32 values travel (``parallel/working.py``)."""

    @property
    def part(self) -> Tensor:
        """This rank's part, in the compute type, to be written to."""

    @property
    def held(self) -> bool:
        """Whether there is one."""

    def hold(self) -> None:
        """Make it, of the values that the parameter has now."""

    def leave(self) -> None:
        """Give up the memory of the parameter's values."""

    def show(self, part: Tensor) -> None:
        """Let the parameter have its values in ``part``."""


MASTER = "master"
"""The key of a parameter's own values in fp32 where they travel with its states."""


class Held(NamedTuple):
    """A tensor that lives in a home: the layout of what the rule made, or a parameter's values."""

    piece: Piece
    key: str
    like: Tensor

    def view(self, data: Tensor) -> Tensor:
        """Return bytes, uint8 in one dimension, as this rank's part of the tensor."""
        part = local(self.like)
        return data.view(part.dtype).view(part.shape)

    def wrapped(self, part: Tensor) -> Tensor:
        """Return this rank's part as the rule's tensor: a DTensor again if it was one."""
        return laid_out(part, self.like)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return local(self.like).nbytes


class Place(NamedTuple):
    """Where a tensor, or what a piece has of it, lives."""

    held: Held
    home: Home
    at: int

    def read(self) -> Tensor:
        """Return it on the host."""
        return self.held.view(self.home.get(self.at))

    def write(self, part: Tensor) -> None:
        """Replace it."""
        self.home.put(self.at, part.contiguous().flatten().view(torch.uint8))


def joined(places: Sequence[Place], copy: WorkingCopy | None) -> Stored:
    """Return a tensor whose pieces are in these places; ``copy``: what must follow it."""
    first = places[0].held
    whole = first.piece.rows is None
    like = first.like if whole else without_memory(first.piece.item.parameter, first.like.dtype)

    def read() -> Tensor:
        if whole:
            return places[0].read()
        part = torch.empty(local(like).shape, dtype=like.dtype)
        for place in places:
            place.held.piece.of(part).copy_(place.read())
        return part

    def write(part: Tensor) -> None:
        for place in places:
            place.write(place.held.piece.of(part))
        if copy is not None:
            copy.part.copy_(part)

    return Stored(like, read, write)


def without_memory(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of this shape and layout whose part here is one number on the host.

    ``dtype`` None: of its type too.
    """
    part = local(tensor.detach())
    return laid_out(torch.zeros((), dtype=dtype or part.dtype).expand(part.shape), tensor)


def laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part as a tensor laid out as ``like``, without a copy."""
    if not isinstance(like, DTensor):
        return part
    made: Tensor = DTensor(part, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made
