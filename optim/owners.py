"""Who computes which logical matrix, and what travels for it: worked out alike on every rank."""

# W ranks of a stage, M logical matrices of a parameter (see matrix_ops.py)

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from allometry.optim.matrix_ops import Cost, Matrix
from allometry.optim.shards import Box, Placed


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A part of one logical matrix: who hands it to the owner, and who wants its part back."""

    matrix: Matrix
    box: Box
    source: int
    owner: int
    holders: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        (top, bottom), (left, right) = self.box.rows, self.box.columns
        return bottom - top, right - left


@dataclass(frozen=True)
class Messages:
    """One all-to-all, seen from one rank: pieces to and from each rank, by its number.

    Both ends of a pair list its pieces in the order of matrices, so nothing has to be labelled.
    ``silent``: no rank of the stage sends anything.
    """

    sent: tuple[tuple[Piece, ...], ...]
    received: tuple[tuple[Piece, ...], ...]
    silent: bool


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together: ``owned`` are the pieces of those that are this rank's."""

    owned: dict[Matrix, tuple[Piece, ...]]
    out: Messages
    back: Messages


@dataclass(frozen=True)
class Plan:
    """How a list of parameters is exchanged: in buckets, one of which travels while another is
    computed. Every rank has as many, of the same matrices; in each, an equal share of its own."""

    buckets: tuple[Bucket, ...]

    @property
    def owned(self) -> tuple[Matrix, ...]:
        """The matrices of this rank, in ascending order."""
        return tuple(matrix for bucket in self.buckets for matrix in bucket.owned)


NUM_BUCKETS = 4
"""What is not hidden behind computing is the first bucket's way out and the last one's way back."""


def plan_exchange(placed: Sequence[Placed], cost: Cost, rank: int, ranks: int) -> Plan:
    """Return what ``rank`` of ``ranks`` does for parameters placed so."""
    pieces = list(_pieces(placed, cost, ranks))
    bucket_of = _buckets_of({piece.matrix: piece.owner for piece in pieces})
    buckets: list[list[Piece]] = [[] for _ in range(1 + max(bucket_of.values(), default=-1))]
    for piece in pieces:
        buckets[bucket_of[piece.matrix]].append(piece)
    return Plan(tuple(_bucket(members, rank, ranks) for members in buckets))


def _buckets_of(owners: Mapping[Matrix, int]) -> dict[Matrix, int]:
    """Return the bucket of each matrix; an owner's are spread evenly, in their order."""
    of_owner: dict[int, list[Matrix]] = {}
    for matrix, owner in owners.items():
        of_owner.setdefault(owner, []).append(matrix)
    return {
        matrix: place * NUM_BUCKETS // max(NUM_BUCKETS, len(matrices))
        for matrices in of_owner.values()
        for place, matrix in enumerate(matrices)
    }


def _bucket(pieces: Sequence[Piece], rank: int, ranks: int) -> Bucket:
    owned: dict[Matrix, list[Piece]] = {}
    for piece in pieces:
        if piece.owner == rank:
            owned.setdefault(piece.matrix, []).append(piece)
    return Bucket(
        owned={matrix: tuple(parts) for matrix, parts in owned.items()},
        out=_messages(((p, p.source, p.owner) for p in pieces), rank, ranks),
        back=_messages(((p, p.owner, to) for p in pieces for to in p.holders), rank, ranks),
    )


def assign_owners(costs: Sequence[float], homes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Return an owner for each matrix: the costliest first, to the rank with the least load (LPT).

    ``homes``: the ranks that have all of a matrix; it stays with one of them, and is not sent, if
    that leaves the rank with its fair share or less. Graham, "Bounds on multiprocessing timing
    anomalies" (1969): LPT gives no rank more than 4/3 of what is possible.
    """
    loads = [0.0] * ranks
    share = sum(costs) / ranks * (1.0 + 1e-9)
    queue = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        while queue[0][0] != loads[queue[0][1]]:  # it has got more to do since it was queued
            heapq.heappop(queue)
        owner = queue[0][1]
        if len(homes[j]) < ranks:
            home = min(homes[j], key=lambda rank: (loads[rank], rank), default=owner)
            owner = home if loads[home] + costs[j] <= share else owner
        loads[owner] += costs[j]
        heapq.heappush(queue, (loads[owner], owner))
        owners[j] = owner
    return owners


def _pieces(placed: Sequence[Placed], cost: Cost, ranks: int) -> Iterator[Piece]:
    """Yield the pieces of all matrices in their order, the same ones on every rank."""
    matrices = [Matrix(i, e) for i, where in enumerate(placed) for e in range(where.size[0])]
    parts = [_parts(placed[matrix.parameter], matrix.expert) for matrix in matrices]
    costs = [cost(*placed[matrix.parameter].size[1:]) for matrix in matrices]
    homes = [boxes[0][1] if len(boxes) == 1 else [] for boxes in parts]
    owners = assign_owners(costs, homes, ranks)
    for j, (matrix, boxes, owner) in enumerate(zip(matrices, parts, owners, strict=True)):
        for box, holders in boxes:
            # Replicas take turns, so that all of them share in the sending.
            source = owner if owner in holders else holders[j % len(holders)]
            yield Piece(matrix, box, source, owner, tuple(holders))


def _parts(placed: Placed, index: int) -> list[tuple[Box, list[int]]]:
    """Return the boxes of one matrix and who holds them."""
    return [
        (Box((index, index + 1), box.rows, box.columns), holders)
        for box, holders in placed.holders.items()
        if box.matrices[0] <= index < box.matrices[1]
    ]


def _messages(pieces: Iterable[tuple[Piece, int, int]], rank: int, ranks: int) -> Messages:
    """Sort (piece, from, to) by the ranks that this one talks to."""
    sent: list[list[Piece]] = [[] for _ in range(ranks)]
    received: list[list[Piece]] = [[] for _ in range(ranks)]
    silent = True
    for piece, source, to in pieces:
        if source == to:
            continue
        silent = False
        if source == rank:
            sent[to].append(piece)
        elif to == rank:
            received[source].append(piece)
    return Messages(tuple(map(tuple, sent)), tuple(map(tuple, received)), silent)
