"""Reference for an exchange plan: enumerate all pieces of all matrices, then select a rank's own.

``optim/owners.py`` must give the same plan without the pieces of other ranks. The reference takes
16 s for 1,024 ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from allometry.optim.matrix_ops import Cost, Matrix
from allometry.optim.owners import NUM_BUCKETS, Bucket, Messages, Piece, Plan
from allometry.optim.shards import Box, Placed


def plain_plan(placed: Sequence[Placed], cost: Cost, rank: int, ranks: int) -> Plan:
    """Reference for ``plan_exchange``."""
    matrices = [Matrix(i, e) for i, where in enumerate(placed) for e in range(where.size[0])]
    parts = [plain_parts(placed[matrix.parameter], matrix.expert) for matrix in matrices]
    costs = [cost(*placed[matrix.parameter].size[1:]) for matrix in matrices]
    homes = [boxes[0][1] if len(boxes) == 1 else [] for boxes in parts]
    owners = plain_owners(costs, homes, ranks)
    apart = len(set(owners)) == len(owners)
    seen = [0] * ranks
    buckets: dict[int, list[Piece]] = {}
    for j, (matrix, boxes, owner) in enumerate(zip(matrices, parts, owners, strict=True)):
        place = seen[owner] * NUM_BUCKETS // max(NUM_BUCKETS, owners.count(owner))
        seen[owner] += 1
        bucket = buckets.setdefault(j % NUM_BUCKETS if apart else place, [])
        for box, holders in boxes:
            source = owner if owner in holders else holders[j % len(holders)]
            bucket.append(Piece(matrix, box, source, owner, tuple(holders)))
    return Plan(tuple(_bucket(buckets[k], rank, ranks) for k in sorted(buckets)), apart)


def plain_owners(costs: Sequence[float], homes: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Reference for ``assign_owners``."""
    loads = [0.0] * ranks
    share = sum(costs) / ranks * (1.0 + 1e-9)
    owners = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        if len(homes[j]) < ranks:
            home = min(homes[j], key=lambda rank: (loads[rank], rank), default=owner)
            owner = home if loads[home] + costs[j] <= share else owner
        loads[owner] += costs[j]
        owners[j] = owner
    return owners


def plain_parts(placed: Placed, index: int) -> list[tuple[Box, list[int]]]:
    """Return the boxes of one matrix and the ranks that store each."""
    holders: dict[Box, list[int]] = {}
    for rank, box in enumerate(placed.boxes):
        if box.numel and box.matrices[0] <= index < box.matrices[1]:
            holders.setdefault(Box((index, index + 1), box.rows, box.columns), []).append(rank)
    return list(holders.items())


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


def _messages(pieces: Iterable[tuple[Piece, int, int]], rank: int, ranks: int) -> Messages:
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
