"""Offloaded tensors as used by rules, checkpoints and working copies."""

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
    """Access to a state between steps; ``like`` has its shape, type and layout, without memory.

    ``read`` returns this rank's part on the host, and ``write`` replaces it; for a ``Stretch`` the
    part is 1-dim.
    """

    like: Tensor | Stretch
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


class WorkingCopy(Protocol):
    """Compute copy of a parameter whose fp32 values are offloaded (``parallel/working.py``)."""

    @property
    def part(self) -> Tensor:
        """Writable view of this rank's part, in the compute type."""

    @property
    def held(self) -> bool:
        """True if the copy exists."""

    def hold(self) -> None:
        """Create the copy from the parameter's current values."""

    def leave(self) -> None:
        """Release the memory of the parameter's values."""

    def show(self, part: Tensor) -> None:
        """Use ``part`` as memory of the parameter's values."""


MASTER = "master"
"""Key of a parameter's fp32 values if they are offloaded with its states."""


class Held(NamedTuple):
    """Offloaded tensor: layout of a rule's state or of a parameter's values."""

    piece: Piece
    key: str
    like: Tensor

    def view(self, data: Tensor) -> Tensor:
        """Return bytes, uint8 1-dim, viewed as this rank's part of the tensor."""
        part = local(self.like)
        return data.view(part.dtype).view(part.shape)

    def wrapped(self, part: Tensor) -> Tensor:
        """Return this rank's part with the rule's layout: a DTensor if the state was one."""
        return laid_out(part, self.like)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return local(self.like).nbytes


class Place(NamedTuple):
    """Location of a tensor, or of a piece of one."""

    held: Held
    home: Home
    at: int

    def read(self) -> Tensor:
        """Return the tensor on the host."""
        return self.held.view(self.home.get(self.at))

    def write(self, part: Tensor) -> None:
        """Replace the tensor."""
        self.home.put(self.at, part.contiguous().flatten().view(torch.uint8))


def joined(places: Sequence[Place], copy: WorkingCopy | None) -> Stored:
    """Return access to a tensor with pieces in ``places``; ``copy`` is updated with it."""
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
    """Return a tensor with this shape and layout whose local part is one expanded host number.

    ``dtype`` None: the type of ``tensor``.
    """
    part = local(tensor.detach())
    return laid_out(torch.zeros((), dtype=dtype or part.dtype).expand(part.shape), tensor)


def laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part as a tensor with the layout of ``like``, without a copy."""
    if not isinstance(like, DTensor):
        return part
    made: Tensor = DTensor(part, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made
