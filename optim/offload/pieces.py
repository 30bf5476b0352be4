"""Parameters, or some rows of one, as what a rule updates at a time."""

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
"""Elements: pieces begin at multiples of so many. Kernels for a CPU round the last few elements of
a tensor, which fill no register of theirs, otherwise."""


@dataclass(eq=False)
class Piece:
    """All that this rank has of a parameter (``rows`` None) or rows of it.

    ``tensor`` is what the rule sees: the parameter, or a plain tensor that stands for the rows.
    ``last``: of the pieces of a parameter, which are updated in their order.
    """

    item: Item
    rows: slice | None = None
    last: bool = True
    tensor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        part = self.item.parameter
        self.tensor = part if self.rows is None else torch.empty_like(local(part.detach())[:0])

    def of(self, part: Tensor) -> Tensor:
        """Return what the piece has of this rank's part of a tensor like the parameter."""
        if self.rows is None:
            return part
        return part.reshape(-1, part.shape[-1] if part.dim() > 1 else 1)[self.rows]

    def seen(self, gradient: Tensor | None, part: Tensor | None = None) -> Item:
        """Return what the rule updates; ``part``: its values, None: where the parameter has them.

        ``gradient`` is that of the piece.
        """
        if self.rows is None:
            return self.item
        self.tensor.grad = None
        self.tensor.data = self.of(self.item.part.detach()) if part is None else part
        self.tensor.grad = gradient
        return Item(self.item.name, self.tensor, self.item.group)

    def unseen(self) -> None:
        """Keep no memory for the rule, which is done."""
        if self.rows is not None:
            self.tensor.grad = None
            self.tensor.data = self.tensor.new_empty(0)


def pieces_of(
    rule: UpdateRule, items: Sequence[Item], sizes: Mapping[str, int], most: int
) -> list[Piece]:
    """Cut what is larger than ``most`` bytes and may be cut; ``sizes``: bytes of each parameter.

    Rules that update elements by themselves see no difference; of states in FP8 a rule wants all.
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
    """Yield pieces in order, in buckets of at most ``most`` bytes or of one larger piece."""
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
