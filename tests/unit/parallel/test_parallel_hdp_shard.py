"""Documents are distributed over a ring completely and evenly, like torch's sharding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.parallel.hdp.shard import Ring, chunks, ring_table
from ring_oracles import local_positions

Lengths = list[int]
rings = st.integers(1, 7)
some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@given(st.integers(1, 300), rings)
def test_chunks_are_those_of_torch_and_leave_nothing_out(length: int, n: int) -> None:
    cut = torch.arange(length).tensor_split(2 * n)
    for member in range(n):
        first, second = chunks(length, n, member)
        assert list(first) == cut[member].tolist()
        assert list(second) == cut[2 * n - 1 - member].tolist()
    held = [place for member in range(n) for run in chunks(length, n, member) for place in run]
    assert sorted(held) == list(range(length))


@given(some_lengths, rings)
def test_rows_are_documents_in_turn_each_in_two_runs_or_whole(lengths: Lengths, n: int) -> None:
    for member in range(n):
        places, runs = local_positions(lengths, n, member)
        assert places.dtype == np.int64
        assert len(runs) == len(lengths) * (2 if n > 1 else 1)
        if n == 1:
            expected = [list(range(length)) for length in lengths]
        else:
            expected = [list(run) for length in lengths for run in chunks(length, n, member)]
        assert places.tolist() == [place for run in expected for place in run]
        assert runs == tuple(map(len, expected))


@given(some_lengths, rings, st.integers(0, 2**31))
def test_a_table_says_what_it_was_told(lengths: Lengths, n: int, tag: int) -> None:
    ranks = tuple(range(2 * n, 0, -2))
    for member in range(n):
        table = ring_table(ranks, member, lengths, tag)
        assert (table.dtype, table.device.type) == (torch.int64, "cpu")
        ring = Ring.of(table)
        assert ring == Ring(ranks, member, tag, tuple(lengths))
        assert ring.tokens(member) == len(local_positions(lengths, n, member)[0])
        assert ring.next_rank == ranks[(member + 1) % n]
        assert ring.previous_rank == ranks[(member - 1) % n]


def seen(lengths: Lengths, n: int, member: int) -> list[tuple[int, int, int]]:
    """Return (document, query, key), by position, of all scores that this member computes."""
    ring = Ring.of(ring_table(range(n), member, lengths, tag=0))

    def rows(holder: int) -> list[tuple[int, int]]:
        held = [chunks(length, n, holder) for length in lengths]
        return [(d, place) for d, runs in enumerate(held) for run in runs for place in run]

    pairs = []
    for step in range(n):
        pairing = ring.pairing(ring.source(step))
        if pairing is None:
            continue
        q, k = pairing.queries, pairing.keys
        for a, b, c, d in zip(q.starts, q.stops, k.starts, k.stops, strict=True):
            queries, keys = rows(member)[a:b], rows(ring.source(step))[c:d]
            assert queries
            assert keys
            for i, (document, query) in enumerate(queries):
                for key_document, key in keys[: i + 1] if pairing.causal else keys:
                    assert key_document == document
                    pairs.append((document, query, key))
    return pairs


@settings(max_examples=40)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=3), rings)
def test_every_query_sees_every_key_up_to_itself_once(lengths: Lengths, n: int) -> None:
    pairs = [score for member in range(n) for score in seen(lengths, n, member)]
    causal = [
        (d, q, k) for d, length in enumerate(lengths) for q in range(length) for k in range(q + 1)
    ]
    assert sorted(pairs) == causal


@given(rings.filter(lambda n: n > 1), st.integers(0, 1000))
def test_work_is_even(n: int, more: int) -> None:
    length = 256 * n + more
    work = [sum(place + 1 for run in chunks(length, n, j) for place in run) for j in range(n)]
    assert sum(work) == length * (length + 1) // 2
    assert max(work) / (sum(work) / n) <= 1.02


def test_work_in_order_would_not_be_even() -> None:
    """Why zig-zag is needed: without it the last member of 4 has 1.75 times the mean work."""
    length, n = 1024, 4
    work = [sum(place + 1 for place in range(256 * j, 256 * j + 256)) for j in range(n)]
    assert max(work) / (sum(work) / n) > 1.7
    assert length == 256 * n


@pytest.mark.parametrize(
    ("ring", "member", "lengths", "tag"),
    [((0, 1), 2, [5], 0), ((1, 1), 0, [5], 0), ((0, 1), 0, [5, 0], 0), ((0, 1), 0, [5], -1)],
)
def test_tables_that_make_no_sense_are_refused(ring, member, lengths, tag) -> None:
    with pytest.raises(AssertionError):
        ring_table(ring, member, lengths, tag)
