"""Unit of an update: a parameter, or some of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from allometry.optim.states import Item
from allometry.parallel.mesh import local
from allometry.scaling.update_rules import UpdateRule

ALIGNED = 64
"""Alignment of pieces in elements. Kernels for a CPU round the last elements of a tensor, which do
not fill a register, differently.
"""


@dataclass(eq=False)
class Piece:
    """This rank's part of a parameter (``rows`` None), or some rows of it.

    ``tensor`` is the rule's parameter: the parameter itself, or a plain tensor for the rows.
    ``last``: the last piece of a parameter; pieces are updated in order.
    """

    item: Item
    rows: slice | None = None
    last: bool = True
    tensor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        part = self.item.parameter
        self.tensor = part if self.rows is None else torch.empty_like(local(part.detach())[:0])

    def of(self, part: Tensor) -> Tensor:
        """Return the piece of ``part``, this rank's part of a tensor shaped like the parameter."""
        if self.rows is None:
            return part
        return part.reshape(-1, part.shape[-1] if part.dim() > 1 else 1)[self.rows]

    def seen(self, gradient: Tensor | None, part: Tensor | None = None) -> Item:
        """Return the item that the rule updates, with ``gradient`` of the piece.

        ``part``: values of the piece; None: use the memory of the parameter.
        """
        if self.rows is None:
            return self.item
        self.tensor.grad = None
        self.tensor.data = self.of(self.item.part.detach()) if part is None else part
        self.tensor.grad = gradient
        return Item(self.item.name, self.tensor, self.item.group)

    def unseen(self) -> None:
        """Release the memory of a piece after its update."""
        if self.rows is not None:
            self.tensor.grad = None
            self.tensor.data = self.tensor.new_empty(0)


def pieces_of(
    rule: UpdateRule, items: Sequence[Item], sizes: Mapping[str, int], most: int
) -> list[Piece]:
    """Split parameters larger than ``most`` bytes if allowed; ``sizes``: bytes of each parameter.

    Elementwise rules give the same result. Parameters with FP8 states are not split.
    """
    return [piece for item in items for piece in _cut(rule, item, sizes[item.name], most)]


def _cut(rule: UpdateRule, item: Item, size: int, most: int) -> Iterator[Piece]:
    part = item.part
    columns = part.shape[-1] if part.dim() > 1 else 1
    rows = part.numel() // max(1, columns)
    unit = ALIGNED // math.gcd(columns, ALIGNED)
    at_once = max(1, most * rows // max(1, size) // unit) * unit
    whole = item.fp8 is not None or not part.is_contiguous()
    if not rule.elementwise or whole or size <= most or rows <= at_once:
        yield Piece(item)
        return
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        yield Piece(item, slice(start, stop), stop == rows)


def packed(pieces: Sequence[Piece], sizes: Mapping[str, int], most: int) -> Iterator[list[Piece]]:
    """Yield pieces in order, in buckets of at most ``most`` bytes, or of one larger piece."""
    bucket: list[Piece] = []
    held = 0.0
    for piece in pieces:
        size: float = sizes[piece.item.name]
        if piece.rows is not None:
            part = piece.item.part
            rows = part.numel() // (part.shape[-1] if part.dim() > 1 else 1)
            size *= (piece.rows.stop - piece.rows.start) / rows
        if bucket and held + size > most:
            yield bucket
            bucket, held = [], 0.0
        bucket.append(piece)
        held += size
    if bucket:
        yield bucket
