"""Shared parts of the ring tests: units, rows of each member, message counts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.parallel.hdp import ring as ring_module
from ring_oracles import Traffic, local_positions

Unit = tuple[tuple[int, ...], tuple[int, ...]]
"""Ranks of a ring in order, and lengths of its documents."""


def held(lengths: Sequence[int], n: int, member: int) -> Tensor:
    """Return the indices of the documents' rows on this member."""
    places, runs = local_positions(lengths, n, member)
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0).repeat_interleave(2 if n > 1 else 1)
    return torch.from_numpy(places) + starts.repeat_interleave(torch.tensor(runs))


def unit_of(units: list[Unit], rank: int) -> tuple[Unit, int] | None:
    """Return the unit that contains a rank, and the rank's index in that ring."""
    return next(((unit, unit[0].index(rank)) for unit in units if rank in unit[0]), None)


@dataclass
class Sent:
    """Count the messages of this rank through ``batch_isend_irecv`` and their bytes."""

    sizes: list[int] = field(default_factory=list)

    @property
    def traffic(self) -> Traffic:
        return Traffic(len(self.sizes), sum(self.sizes))


@contextmanager
def counting() -> Iterator[Sent]:
    sent, real = Sent(), dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent.sizes += [op.tensor.nbytes for op in operations if op.op is dist.isend]
        return real(operations)

    ring_module.dist.batch_isend_irecv = counted
    try:
        yield sent
    finally:
        ring_module.dist.batch_isend_irecv = real
