"""How documents lie on the members of a ring: zig-zag, so that all have the same work.

A document of L tokens is cut into 2n chunks that differ by a token at most, and member j of n
holds chunks j and 2n-1-j: with causal attention an early chunk is cheap and a late one costly
(arXiv 2502.21231, Fig. 14). Nothing is filled up: lengths need not be divisible, chunks may be
empty. A member's rows are, document after document, its first chunk and then its second.
"""

# n members of a ring, j this member, d documents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


def chunks(length: int, n: int, member: int) -> tuple[range, range]:
    """Return the places in a document of ``length`` tokens that ``member`` of ``n`` holds."""
    assert 0 <= member < n, (member, n)
    return _chunk(length, n, member), _chunk(length, n, 2 * n - 1 - member)


def _chunk(length: int, n: int, i: int) -> range:
    """Chunk i of 2n, cut as ``torch.tensor_split`` cuts: the first ones are a token longer."""
    short, longer = divmod(length, 2 * n)
    start = i * short + min(i, longer)
    return range(start, start + short + (i < longer))


def ring_table(ring: Sequence[int], member: int, lengths: Sequence[int], tag: int) -> Tensor:
    """Return all that ``ring_attention`` must know of a unit, int64 on the CPU.

    ``ring``: the hdp ranks in their order; ``member``: this rank's place in it; ``lengths``: of
    the whole documents; ``tag``: a number of this unit that no other unit of the step has. Members
    that run different units at once then wait for each other on gloo, rather than take one's keys
    for the other's.
    """
    assert 0 <= member < len(ring), (ring, member)
    assert len(set(ring)) == len(ring), ring
    assert min(lengths) >= 1, lengths
    assert tag >= 0, tag
    return torch.tensor([len(ring), member, tag, *ring, *lengths], dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of rows, ascending and none empty: run i is ``starts[i]`` to ``stops[i]``."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How long each run is."""
        return tuple(b - a for a, b in zip(self.starts, self.stops, strict=True))

    def index(self) -> slice | Ints:
        """Return what selects these rows: a slice where they follow upon one another."""
        if self.starts[1:] == self.stops[:-1]:
            return slice(self.starts[0], self.stops[-1])
        runs = zip(self.starts, self.stops, strict=True)
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in runs])


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which of a member's queries see which of a source's keys: run i sees run i, and wholly.

    ``causal``: row by row only up to itself; then the runs are equal.
    """

    queries: Rows
    keys: Rows
    causal: bool


@dataclass(frozen=True, slots=True)
class Ring:
    """What a table says: the hdp ranks of a ring, this member's place, the documents' lengths."""

    ranks: tuple[int, ...]
    member: int
    tag: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, table: Tensor) -> Ring:
        """Read a ``ring_table``."""
        n, member, tag, *rest = table.tolist()
        return cls(tuple(rest[:n]), member, tag, tuple(rest[n:]))

    @property
    def size(self) -> int:
        """How many members there are."""
        return len(self.ranks)

    @property
    def next_rank(self) -> int:
        """The hdp rank of the member after this one."""
        return self.ranks[(self.member + 1) % self.size]

    @property
    def previous_rank(self) -> int:
        """The hdp rank of the member before this one."""
        return self.ranks[self.member - 1]

    def source(self, step: int) -> int:
        """Return the member whose keys are here after so many hops."""
        return (self.member - step) % self.size

    def tokens(self, member: int) -> int:
        """Return how many rows ``member`` holds, filling not counted."""
        return int(sum(part.sum() for part in self._chunk_lengths(member)))

    def _chunk_lengths(self, member: int) -> tuple[Ints, Ints]:
        short_d, longer_d = np.divmod(np.array(self.lengths, np.int64), 2 * self.size)
        return short_d + (member < longer_d), short_d + (2 * self.size - 1 - member < longer_d)

    def pairing(self, source: int) -> Pairing | None:
        """Return which rows of this member see which of ``source``, None if none does.

        Of the four pairs of chunks the causal mask leaves whole ones: keys of an earlier member
        come with a first chunk before both of ours and a second after both; those of a later
        member lie between our two.
        """
        first_d, second_d = self._chunk_lengths(self.member)
        start_d = np.cumsum(first_d + second_d) - first_d - second_d
        stop_d = start_d + first_d + second_d
        if source == self.member:
            return _pairing(start_d, stop_d, start_d, stop_d, causal=True)
        key_first_d, key_second_d = self._chunk_lengths(source)
        key_start_d = np.cumsum(key_first_d + key_second_d) - key_first_d - key_second_d
        if source < self.member:
            return _pairing(start_d, stop_d, key_start_d, key_start_d + key_first_d, causal=False)
        key_stop_d = key_start_d + key_first_d + key_second_d
        return _pairing(start_d + first_d, stop_d, key_start_d, key_stop_d, causal=False)


def _pairing(
    start_d: Ints, stop_d: Ints, key_start_d: Ints, key_stop_d: Ints, *, causal: bool
) -> Pairing | None:
    """Leave out documents of which one side has nothing: kernels do not survive them."""
    kept_d = (start_d < stop_d) & (key_start_d < key_stop_d)
    if not kept_d.any():
        return None
    starts, stops, key_starts, key_stops = (
        tuple(bound_d[kept_d].tolist()) for bound_d in (start_d, stop_d, key_start_d, key_stop_d)
    )
    return Pairing(Rows(starts, stops), Rows(key_starts, key_stops), causal)
