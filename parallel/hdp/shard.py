"""Zig-zag sharding of documents over the members of a ring, which balances causal attention.

A document of L tokens is split into 2n chunks whose lengths differ by at most one token. Member j
of n has chunks j and 2n-1-j: with causal attention an early chunk is cheap and a late chunk is
expensive (arXiv 2502.21231, Fig. 14). Documents are not padded: lengths need not be divisible, and
chunks may be empty. The rows of a member are, for each document, its first chunk and then its
second chunk.
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
    """Return the two ranges of positions of ``member`` of ``n`` in a document of ``length``.

    For example, ``chunks(8, 2, 0)`` is ``range(0, 2), range(6, 8)``.
    """
    assert 0 <= member < n, (member, n)
    return _chunk(length, n, member), _chunk(length, n, 2 * n - 1 - member)


def _chunk(length: int, n: int, i: int) -> range:
    """Return chunk i of 2n, split as in ``torch.tensor_split``: longer chunks come first."""
    short, longer = divmod(length, 2 * n)
    start = i * short + min(i, longer)
    return range(start, start + short + (i < longer))


def ring_table(ring: Sequence[int], member: int, lengths: Sequence[int], tag: int) -> Tensor:
    """Return the arguments of ``ring_attention`` for a unit as one tensor, int64 on the CPU.

    ``ring``: the hdp ranks in ring order; ``member``: this rank's index in the ring; ``lengths``:
    the lengths of the unsharded documents; ``tag``: a number that is unique among the units of the
    step. With gloo, members that run different units at the same time then wait for each other
    instead of receiving keys of the wrong unit. For example, ``ring_table((2, 0), 1, (100,), 0)``
    is the table of hdp rank 0 in a ring of ranks 2 and 0.
    """
    assert 0 <= member < len(ring), (ring, member)
    assert len(set(ring)) == len(ring), ring
    assert min(lengths) >= 1, lengths
    assert tag >= 0, tag
    return torch.tensor([len(ring), member, tag, *ring, *lengths], dtype=torch.int64)


def repeated_table(table: Tensor, count: int) -> Tensor:
    """Return the table of ``count`` copies of all documents of a ``ring_table``, copy by copy."""
    n = int(table[0])
    return torch.cat([table[: 3 + n], table[3 + n :].repeat(count)])


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of rows in ascending order, all non-empty: run i is ``starts[i]`` to ``stops[i]``."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of each run."""
        return tuple(b - a for a, b in zip(self.starts, self.stops, strict=True))

    def index(self) -> slice | Ints:
        """Return an index of these rows: a slice if the runs are adjacent, else an array.

        For example, ``Rows((0, 4), (4, 6)).index()`` is ``slice(0, 6)``.
        """
        if self.starts[1:] == self.stops[:-1]:
            return slice(self.starts[0], self.stops[-1])
        runs = zip(self.starts, self.stops, strict=True)
        return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in runs])


@dataclass(frozen=True, slots=True)
class Pairing:
    """Visible queries and keys of a pair of members: run i of queries sees all of run i of keys.

    ``causal``: a query sees keys only up to its own row; the runs then have equal lengths.
    """

    queries: Rows
    keys: Rows
    causal: bool


@dataclass(frozen=True, slots=True)
class Ring:
    """Decoded ``ring_table``: hdp ranks of the ring, this member's index, tag, document lengths."""

    ranks: tuple[int, ...]
    member: int
    tag: int
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, table: Tensor) -> Ring:
        """Decode a ``ring_table``."""
        n, member, tag, *rest = table.tolist()
        return cls(tuple(rest[:n]), member, tag, tuple(rest[n:]))

    @property
    def size(self) -> int:
        """Number of members."""
        return len(self.ranks)

    @property
    def next_rank(self) -> int:
        """hdp rank of the next member."""
        return self.ranks[(self.member + 1) % self.size]

    @property
    def previous_rank(self) -> int:
        """hdp rank of the previous member."""
        return self.ranks[self.member - 1]

    def source(self, step: int) -> int:
        """Return the member whose keys this member has after ``step`` hops.

        For example, member 0 of 3 has the keys of member 2 after one hop.
        """
        return (self.member - step) % self.size

    def tokens(self, member: int) -> int:
        """Return the number of rows of ``member``, without padding."""
        return int(sum(part.sum() for part in self._chunk_lengths(member)))

    def _chunk_lengths(self, member: int) -> tuple[Ints, Ints]:
        short_d, longer_d = np.divmod(np.array(self.lengths, np.int64), 2 * self.size)
        return short_d + (member < longer_d), short_d + (2 * self.size - 1 - member < longer_d)

    def pairing(self, source: int) -> Pairing | None:
        """Return the rows of this member that see rows of ``source``; None without such rows.

        The causal mask keeps or drops complete pairs of chunks. For an earlier member, its first
        chunk is visible to both of our chunks and its second chunk to neither. For a later member,
        both of its chunks are visible to our second chunk only.
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
    """Drop documents with an empty side: kernels do not support empty runs."""
    kept_d = (start_d < stop_d) & (key_start_d < key_stop_d)
    if not kept_d.any():
        return None
    starts, stops, key_starts, key_stops = (
        tuple(bound_d[kept_d].tolist()) for bound_d in (start_d, stop_d, key_start_d, key_stop_d)
    )
    return Pairing(Rows(starts, stops), Rows(key_starts, key_stops), causal)
