"""Owners of matrices and the messages between them, on one process."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from allometry.optim.matrix_ops import Matrix
from allometry.optim.owners import Bucket, Messages, Piece, Plan, assign_owners, plan_exchange
from allometry.optim.shards import Box, Placed
from plain_owners import plain_owners, plain_plan


def work(rows: int, columns: int) -> float:
    return float(rows * columns)


def cut(size: tuple[int, int, int], dim: int, shards: int, replicas: int) -> Placed:
    """Return a parameter sharded along one dimension as evenly as possible, with replicas."""
    each = -(-size[dim] // shards)
    boxes = []
    for shard in range(shards):
        ranges = [(0, n) for n in size]
        ranges[dim] = (min(shard * each, size[dim]), min((shard + 1) * each, size[dim]))
        boxes += [Box(*ranges)] * replicas
    return Placed(size, tuple(boxes))


def test_whole_everywhere_is_every_rank_having_all() -> None:
    assert cut((1, 4, 6), 1, 1, 3).whole_everywhere
    assert not cut((1, 4, 6), 1, 2, 1).whole_everywhere
    assert not cut((1, 4, 6), 1, 2, 2).whole_everywhere
    # One row for two ranks: the first has it and the second has an empty shard.
    assert not cut((1, 1, 6), 1, 2, 1).whole_everywhere


placements = st.tuples(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)), st.integers(0, 2)
)


@given(st.lists(placements, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 2))
def test_pieces_make_up_matrices_and_messages_match(
    parameters: list[tuple[tuple[int, int, int], int]], shards: int, replicas: int
) -> None:
    placed = [cut(size, dim, shards, replicas) for size, dim in parameters]
    ranks = shards * replicas
    plans = [plan_exchange(placed, work, rank, ranks) for rank in range(ranks)]
    owned = [matrix for plan in plans for matrix in plan.owned]
    assert len(owned) == len(set(owned)) == sum(size[0] for size, _ in parameters)
    for plan in plans:
        assert list(plan.owned) == sorted(plan.owned)
        for matrix, pieces in _owned(plan).items():
            _, rows, columns = placed[matrix.parameter].size
            assert sum(a * b for a, b in (piece.shape for piece in pieces)) == rows * columns
    assert len({len(plan.buckets) for plan in plans}) == 1
    for k in range(len(plans[0].buckets)):
        _messages_match([plan.buckets[k] for plan in plans])
    for rank, plan in enumerate(plans):
        returned = sum(_area(found) for bucket in plan.buckets for found in bucket.back.received)
        returned += sum(
            piece.shape[0] * piece.shape[1]
            for pieces in _owned(plan).values()
            for piece in pieces
            if rank in piece.holders
        )
        assert returned == sum(where.boxes[rank].numel for where in placed), "all comes back"


@given(st.lists(placements, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 2))
def test_the_plan_is_that_of_the_plain_algorithm(
    parameters: list[tuple[tuple[int, int, int], int]], shards: int, replicas: int
) -> None:
    placed = [cut(size, dim, shards, replicas) for size, dim in parameters]
    ranks = shards * replicas
    for rank in range(ranks):
        wanted = plain_plan(placed, work, rank, ranks)
        assert _plain(plan_exchange(placed, work, rank, ranks)) == _plain(wanted)


def _plain(plan: Plan) -> object:
    """Convert a plan to values: pieces compare by identity."""

    def of(piece: Piece) -> object:
        return (piece.matrix, piece.box, piece.source, piece.owner, piece.holders)

    def messages(each: Messages) -> object:
        lists = (each.sent, each.received)
        return [[[of(p) for p in pieces] for pieces in way] for way in lists], each.silent

    return plan.apart, [
        (
            {matrix: [of(p) for p in pieces] for matrix, pieces in bucket.owned.items()},
            messages(bucket.out),
            messages(bucket.back),
        )
        for bucket in plan.buckets
    ]


def test_pieces_of_a_rank_are_the_same_objects_wherever_they_are_listed() -> None:
    placed = [cut((2, 6, 5), 1, 3, 1)] * 5
    for rank in range(3):
        for bucket in plan_exchange(placed, work, rank, 3).buckets:
            own = {id(piece) for pieces in bucket.owned.values() for piece in pieces}
            listed = [*bucket.out.received, *bucket.back.sent]
            assert {id(piece) for pieces in listed for piece in pieces} <= own


def test_with_more_ranks_than_matrices_each_bucket_has_ranks_of_its_own() -> None:
    plans = [plan_exchange([cut((1, 6, 6), 0, 9, 1)] * 8, work, rank, 9) for rank in range(9)]
    assert all(plan.apart for plan in plans)
    by_bucket = [{r for r in range(9) if plans[r].buckets[k].owned} for k in range(4)]
    assert [len(ranks) for ranks in by_bucket] == [2, 2, 2, 2]
    assert len(set.union(*by_bucket)) == 8
    crowded = plan_exchange([cut((1, 6, 6), 0, 9, 1)] * 10, work, 0, 9)
    assert not crowded.apart


def _messages_match(buckets: list[Bucket]) -> None:
    for direction in ("out", "back"):
        assert len({getattr(bucket, direction).silent for bucket in buckets}) == 1
        for a, b in itertools.product(range(len(buckets)), repeat=2):
            assert _sent(buckets[a], direction, b) == _received(buckets[b], direction, a)


def _owned(plan: Plan) -> dict[Matrix, tuple[Piece, ...]]:
    return {matrix: pieces for bucket in plan.buckets for matrix, pieces in bucket.owned.items()}


def _sent(plan: Bucket, direction: str, to: int) -> list[object]:
    return [(p.matrix, p.box) for p in getattr(plan, direction).sent[to]]


def _received(plan: Bucket, direction: str, source: int) -> list[object]:
    return [(p.matrix, p.box) for p in getattr(plan, direction).received[source]]


def _area(pieces: tuple[object, ...]) -> int:
    return sum(piece.shape[0] * piece.shape[1] for piece in pieces)  # type: ignore[attr-defined]


def test_of_replicas_that_have_everything_only_the_owner_sends() -> None:
    placed = [cut((1, 6, 5), 0, 1, 4) for _ in range(8)]
    plans = [plan_exchange(placed, work, rank, 4) for rank in range(4)]
    buckets = [bucket for plan in plans for bucket in plan.buckets]
    assert all(bucket.out.silent and not bucket.back.silent for bucket in buckets)
    assert [len(plan.owned) for plan in plans] == [2, 2, 2, 2]


def test_buckets_have_an_equal_share_of_each_owners_matrices() -> None:
    plans = [plan_exchange([cut((1, 6, 6), 0, 2, 1)] * 22, work, rank, 2) for rank in range(2)]
    for plan in plans:
        assert sorted(len(bucket.owned) for bucket in plan.buckets) == [2, 3, 3, 3]
    few = plan_exchange([cut((1, 6, 6), 1, 2, 1)] * 4, work, 0, 2)
    assert [len(bucket.owned) for bucket in few.buckets] == [1, 1]
    assert not few.apart


def test_experts_stay_where_they_are() -> None:
    plans = [plan_exchange([cut((4, 6, 5), 0, 2, 1)], work, rank, 2) for rank in range(2)]
    assert all(w.out.silent and w.back.silent for plan in plans for w in plan.buckets)


@given(
    st.lists(st.floats(0.5, 100.0), min_size=1, max_size=40),
    st.integers(1, 8),
    st.data(),
)
def test_no_rank_has_more_than_half_again_of_what_is_possible(
    costs: list[float], ranks: int, data: st.DataObject
) -> None:
    some = st.lists(st.integers(0, ranks - 1), max_size=ranks, unique=True)
    homes = [data.draw(some) for _ in costs]
    owners = assign_owners(costs, homes, ranks)
    assert owners == plain_owners(costs, homes, ranks)
    loads = [
        sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(ranks)
    ]
    order = sorted(costs, reverse=True)
    # Lower bounds of any assignment: the mean, the largest cost, and two that must share a rank.
    least = max(sum(costs) / ranks, order[0])
    if len(order) > ranks:
        least = max(least, order[ranks - 1] + order[ranks])
    assert max(loads) <= 1.5 * least + 1e-9
