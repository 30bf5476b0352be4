"""Plan of owners and messages for logical matrices, computed identically on every rank."""

# W ranks of a stage, M logical matrices of a parameter (see matrix_ops.py)

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allometry.optim.matrix_ops import Cost, Matrix
from allometry.optim.shards import Box, Placed


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Part of one logical matrix: ``source`` sends the part to the owner, ``holders`` store it."""

    matrix: Matrix
    box: Box
    source: int
    owner: int
    holders: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns."""
        (top, bottom), (left, right) = self.box.rows, self.box.columns
        return bottom - top, right - left


@dataclass(frozen=True)
class Messages:
    """One all-to-all as seen by one rank: pieces to and from each rank.

    Both ends of a pair list their pieces in the order of matrices, so pieces need no labels.
    ``silent``: no rank of the stage sends a message.
    """

    sent: tuple[tuple[Piece, ...], ...]
    received: tuple[tuple[Piece, ...], ...]
    silent: bool


@dataclass(frozen=True)
class Bucket:
    """Matrices that are communicated together; ``owned`` are the pieces of this rank's matrices."""

    owned: dict[Matrix, tuple[Piece, ...]]
    out: Messages
    back: Messages


@dataclass(frozen=True)
class Plan:
    """Exchange of a list of parameters in buckets, which overlaps communication and computation.

    Every rank has the same number of buckets with the same matrices; each bucket contains an equal
    share of a rank's own matrices. ``apart``: no rank owns more than one matrix, so each bucket is
    computed by different ranks. All buckets may then start at once, since no rank needs more
    memory.
    """

    buckets: tuple[Bucket, ...]
    apart: bool = False

    @property
    def owned(self) -> tuple[Matrix, ...]:
        """Matrices of this rank in ascending order."""
        return tuple(matrix for bucket in self.buckets for matrix in bucket.owned)


NUM_BUCKETS = 4
"""Number of buckets; only sending the first and returning the last bucket is not overlapped."""


def plan_exchange(placed: Sequence[Placed], cost: Cost, rank: int, ranks: int) -> Plan:
    """Return the plan of ``rank`` of ``ranks`` for parameters with this sharding.

    The time is linear in the number of matrices and in the pieces of this rank's matrices; for
    other ranks' matrices only the local part is visited.
    """
    owners = _owners_of(placed, cost, ranks)
    bucket_of = _buckets_of(owners)
    made = [_Drafted(ranks) for _ in range(1 + max(bucket_of.values(), default=-1))]
    for j, (matrix, owner) in enumerate(owners.items()):
        where, drafted = placed[matrix.parameter], made[bucket_of[matrix]]
        parts = where.parts[matrix.expert]
        drafted.silent_out &= len(parts) == 1 and owner in parts[0][1]
        drafted.silent_back &= len(parts) == 1 and parts[0][1] == (owner,)
        mine = where.boxes[rank]
        if owner == rank:
            drafted.own(matrix, tuple(_piece(matrix, *part, j, owner) for part in parts))
        elif mine.numel and mine.matrices[0] <= matrix.expert < mine.matrices[1]:
            box = mine.of_matrix(matrix.expert)
            drafted.hold(_piece(matrix, box, where.holders[mine], j, owner), rank)
    apart = len(set(owners.values())) == len(owners)
    return Plan(tuple(each.bucket() for each in made), apart)


def _piece(matrix: Matrix, box: Box, holders: tuple[int, ...], j: int, owner: int) -> Piece:
    # Replicas take turns, so that sending is shared between them.
    source = owner if owner in holders else holders[j % len(holders)]
    return Piece(matrix, box, source, owner, holders)


_Ways = tuple[list[list[Piece]], list[list[Piece]]]


class _Drafted:
    """Bucket under construction; matrices are added in order."""

    def __init__(self, ranks: int) -> None:
        self.owned: dict[Matrix, tuple[Piece, ...]] = {}
        self.silent_out = self.silent_back = True
        # Pieces to send to each rank, and to receive from each rank.
        self.out: _Ways = ([[] for _ in range(ranks)], [[] for _ in range(ranks)])
        self.back: _Ways = ([[] for _ in range(ranks)], [[] for _ in range(ranks)])

    def own(self, matrix: Matrix, pieces: tuple[Piece, ...]) -> None:
        """Add a matrix that this rank owns."""
        self.owned[matrix] = pieces
        for piece in pieces:
            if piece.source != piece.owner:
                self.out[1][piece.source].append(piece)
            for to in piece.holders:
                if to != piece.owner:
                    self.back[0][to].append(piece)

    def hold(self, piece: Piece, rank: int) -> None:
        """Add the local piece of a matrix that another rank owns."""
        if piece.source == rank:
            self.out[0][piece.owner].append(piece)
        self.back[1][piece.owner].append(piece)

    def bucket(self) -> Bucket:
        """Return the finished bucket."""
        out, back = (
            Messages(tuple(map(tuple, sent)), tuple(map(tuple, received)), silent)
            for (sent, received), silent in (
                (self.out, self.silent_out),
                (self.back, self.silent_back),
            )
        )
        return Bucket(self.owned, out, back)


def _owners_of(placed: Sequence[Placed], cost: Cost, ranks: int) -> dict[Matrix, int]:
    """Return the owner of each matrix, in the order of matrices, the same on every rank."""
    matrices = [Matrix(i, e) for i, where in enumerate(placed) for e in range(where.size[0])]
    costs, homes = [], []
    for i, e in matrices:
        parts = placed[i].parts[e]
        costs.append(cost(*placed[i].size[1:]))
        homes.append(parts[0][1] if len(parts) == 1 else ())
    return dict(zip(matrices, assign_owners(costs, homes, ranks), strict=True))


def _buckets_of(owners: Mapping[Matrix, int]) -> dict[Matrix, int]:
    """Return the bucket of each matrix; the matrices of an owner are spread evenly, in order.

    If no rank owns more than one matrix, the owners are spread: a bucket is a group of ranks, which
    compute while the next group's pieces arrive and the previous group's results are sent.
    """
    of_owner: dict[int, list[Matrix]] = {}
    for matrix, owner in owners.items():
        of_owner.setdefault(owner, []).append(matrix)
    if len(of_owner) == len(owners):
        return {matrix: place % NUM_BUCKETS for place, matrix in enumerate(owners)}
    return {
        matrix: place * NUM_BUCKETS // max(NUM_BUCKETS, len(matrices))
        for matrices in of_owner.values()
        for place, matrix in enumerate(matrices)
    }


def assign_owners(costs: Sequence[float], homes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Return an owner for each matrix: largest cost first, to the least loaded rank (LPT).

    ``homes``: the ranks that have an unsharded copy of a matrix. One of these ranks owns the
    matrix, which is then not sent, if the rank's load does not exceed its fair share. Graham,
    "Bounds on multiprocessing timing anomalies" (1969): with LPT no rank has more than 4/3 of the
    optimal maximum. For example, costs 3, 2, 2 without homes on 2 ranks give the owners 0, 1, 1.
    """
    loads = np.zeros(ranks)
    share = sum(costs) / ranks * (1.0 + 1e-9)
    queue = [(0.0, rank) for rank in range(ranks)]
    owners = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        while queue[0][0] != loads[queue[0][1]]:  # outdated entry: the load has grown
            heapq.heappop(queue)
        owner = queue[0][1]
        if 0 < len(homes[j]) < ranks:
            at_home = np.sort(homes[j])
            home = int(at_home[loads[at_home].argmin()])  # the first of the least loaded
            owner = home if loads[home] + costs[j] <= share else owner
        loads[owner] += costs[j]
        heapq.heappush(queue, (float(loads[owner]), owner))
        owners[j] = owner
    return owners
