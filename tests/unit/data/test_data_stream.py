import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import SequenceData
from allometry.configs.errors import UserError
from allometry.data.batch import IGNORE, Batch
from allometry.data.order import DocumentOrder, permutation
from allometry.data.shuffle import Shuffle
from allometry.data.store import TokenStore
from allometry.data.stream import Stream
from allometry.data.synthetic import write_store
from stores import sources, write_two_sources


def config(
    folder: Path, length: int, packing: str = "per_document", **weights: float
) -> SequenceData:
    shape = {"sequence_length": length, "packing": packing}
    return SequenceData.model_validate({**shape, "sources": sources(folder, **weights)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("stores"))


def plain_line(store: TokenStore, key: str) -> Iterator[tuple[int, bool]]:
    """Reference for the endless sequence: each token, and whether it ends its document."""
    for epoch in itertools.count():
        for document in permutation(f"{key}:{epoch}", store.num_documents):
            tokens = store.read(int(document)).tolist()
            yield from ((token, n == len(tokens) - 1) for n, token in enumerate(tokens))


def same(a: Batch, b: Batch) -> None:
    np.testing.assert_array_equal(a.tokens_BL, b.tokens_BL)
    np.testing.assert_array_equal(a.targets_BL, b.targets_BL)
    np.testing.assert_array_equal(a.source_B, b.source_B)
    assert (a.documents is None) == (b.documents is None)
    if a.documents is not None and b.documents is not None:
        np.testing.assert_array_equal(a.documents.cu_lengths, b.documents.cu_lengths)
        np.testing.assert_array_equal(a.documents.positions_BL, b.documents.positions_BL)
        assert a.documents.max_length == b.documents.max_length


@pytest.mark.parametrize("length", [1, 2, 7, 16, 501])
@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_batches_follow_the_definition(folder: Path, length: int, packing: str) -> None:
    stream = Stream(config(folder, length, packing, code=2, prose=1), seed=7)
    batch = stream.batch(0, 30)
    assert batch.tokens_BL.dtype == batch.targets_BL.dtype == np.int64
    for s, store in enumerate(stream.stores[:2]):
        rows = np.flatnonzero(batch.source_B == s)
        order = DocumentOrder(store, stream.sources[s], 7)
        windows = [order.window(k, length) for k in range(len(rows))]
        rows = rows[np.argsort(windows)]
        tokens_needed = (max(windows) + 1) * length + 1
        whole = list(itertools.islice(plain_line(store, f"7:{stream.sources[s]}"), tokens_needed))
        read = np.concatenate([np.arange(w * length, (w + 1) * length) for w in sorted(windows)])
        line = [whole[place] for place in read]
        tokens = np.array([token for token, _ in line])
        expected = np.array([whole[place + 1][0] for place in read])
        if packing == "per_document":
            expected[[last for _, last in line]] = IGNORE
        np.testing.assert_array_equal(batch.tokens_BL[rows].reshape(-1), tokens)
        np.testing.assert_array_equal(batch.targets_BL[rows].reshape(-1), expected)
        if packing == "per_document":
            assert batch.documents is not None
            position = -1
            for n, (found, (_, last)) in enumerate(
                zip(batch.documents.positions_BL[rows].reshape(-1), line, strict=False)
            ):
                position = 0 if n % length == 0 else position + 1
                assert found == position
                if last:
                    position = -1


@pytest.mark.parametrize("length", [1, 3, 16, 700])
def test_documents_are_runs_of_the_flat_tokens(folder: Path, length: int) -> None:
    batch = Stream(config(folder, length, code=1, prose=1), seed=1).batch(3, 9)
    documents = batch.documents
    assert documents is not None
    assert documents.cu_lengths.dtype == np.int32
    assert documents.cu_lengths[0] == 0
    assert documents.cu_lengths[-1] == 9 * length
    assert np.diff(documents.cu_lengths).min() > 0
    assert documents.max_length == np.diff(documents.cu_lengths).max()
    assert set(range(0, 9 * length, length)) <= set(documents.cu_lengths.tolist())
    starts = np.flatnonzero(documents.positions_BL.reshape(-1) == 0)
    np.testing.assert_array_equal(starts, documents.cu_lengths[:-1])
    # Within a run every target counts and is the next token: targets never cross documents.
    flat, targets = batch.tokens_BL.reshape(-1), batch.targets_BL.reshape(-1)
    for begin, end in itertools.pairwise(documents.cu_lengths.tolist()):
        np.testing.assert_array_equal(targets[begin : end - 1], flat[begin + 1 : end])
        assert targets[end - 1] in (IGNORE, flat[end - 1] + 1)


@settings(max_examples=40)
@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 40))
def test_a_batch_is_its_samples(folder: Path, position: int, count: int, length: int) -> None:
    data = config(folder, length, code=0.7, prose=0.3)
    stream, other = Stream(data, 3), Stream(data, 3)
    whole = stream.batch(position, count)
    singles = [other.batch(position + k, 1) for k in reversed(range(count))][::-1]
    same(whole, Batch.concatenate(singles))
    for k in range(count):
        same(whole.rows(k, k + 1), singles[k])
    same(whole.rows(count // 2, count), other.batch(position + count // 2, count - count // 2))


def test_each_token_is_a_target_once_an_epoch(folder: Path) -> None:
    data = config(folder, 8, "concatenated", code=1)
    store = TokenStore(folder / "code")
    samples = 8 * store.num_tokens // 8  # eight epochs
    batch = Stream(data, 0).batch(0, samples)
    found = np.bincount(batch.targets_BL.reshape(-1), minlength=store.num_tokens + 1)[1:]
    ends = np.empty(2, np.int64)
    order = DocumentOrder(store, "code", 0)
    for k, place in enumerate((0, samples * 8)):
        order.read(place, ends[k : k + 1])
    first, after = ends
    expected = np.full(store.num_tokens, 8)
    expected[first - 1] -= 1  # the first token has no predecessor
    expected[after - 1] += 1
    np.testing.assert_array_equal(found, expected)


def test_seed_name_and_epoch_decide_the_order(folder: Path) -> None:
    data = config(folder, 64, code=1)
    tokens = Stream(data, 0).batch(0, 4).tokens_BL
    assert not np.array_equal(tokens, Stream(data, 1).batch(0, 4).tokens_BL)
    store = TokenStore(folder / "code")
    out = np.empty(store.num_tokens, np.int64)
    orders = []
    for name, start in (("a", 0), ("a", store.num_tokens), ("b", 0)):
        DocumentOrder(store, name, 0).read(start, out)
        orders.append(tuple(out))
        np.testing.assert_array_equal(np.sort(out), np.arange(1, store.num_tokens + 1))
    assert len(set(orders)) == 3


def test_another_source_does_not_change_a_source(folder: Path) -> None:
    both = Stream(config(folder, 16, code=1, prose=1), 5).batch(0, 40)
    alone = Stream(config(folder, 16, code=1), 5).batch(0, 20)
    np.testing.assert_array_equal(both.tokens_BL[both.source_B == 0], alone.tokens_BL)


def test_order_is_pinned() -> None:
    """A change of this order changes every run's data and needs a new format version."""
    assert permutation("0:code:0", 12).tolist() == [1, 0, 2, 5, 7, 4, 6, 10, 8, 11, 9, 3]
    for count in (1, 2, 3, 64, 65, 1000):
        assert sorted(permutation("k", count).tolist()) == list(range(count))


@settings(max_examples=60)
@given(st.integers(1, 700), st.text(max_size=5))
def test_a_shuffle_is_a_bijection(size: int, key: str) -> None:
    shuffle = Shuffle(key, size)
    assert sorted(map(shuffle, range(size))) == list(range(size))


def test_shuffles_are_fair_and_pinned() -> None:
    assert [Shuffle("0:code:0:8", 12)(k) for k in range(12)] == [
        1,
        8,
        7,
        5,
        10,
        11,
        3,
        4,
        0,
        9,
        2,
        6,
    ]
    where = np.array([[Shuffle(f"{k}", 5)(j) for j in range(5)] for k in range(6000)])
    table = np.stack([np.bincount(where[:, j], minlength=5) for j in range(5)])
    assert np.abs(table - 1200).max() < 5 * np.sqrt(1200)
    assert 0 <= Shuffle("large", 10**12)(10**11) < 10**12


def test_windows_of_an_epoch_are_shuffled_among_themselves(folder: Path) -> None:
    store = TokenStore(folder / "code")
    for length in (1, 7, 16, store.num_tokens, 3 * store.num_tokens):
        order = DocumentOrder(store, "code", 0)
        samples = 5 * store.num_tokens // length + 2
        windows = [order.window(k, length) for k in range(samples)]
        for k, window in enumerate(windows):
            epoch = k * length // store.num_tokens
            assert window * length // store.num_tokens == epoch
        whole = [k for k, w in enumerate(windows) if w * length // store.num_tokens < 4]
        assert sorted(windows[k] for k in whole) == whole
        if length == 7:
            assert windows != sorted(windows)
        assert [DocumentOrder(store, "code", None).window(k, length) for k in (0, 5)] == [0, 5]


def test_permutations_are_fair() -> None:
    where = np.array([permutation(f"{k}", 5) for k in range(6000)])
    table = np.stack([np.bincount(where[:, k], minlength=5) for k in range(5)])
    assert np.abs(table - 1200).max() < 5 * np.sqrt(1200)


def test_ledger_counts_the_tokens_served(folder: Path) -> None:
    stream = Stream(config(folder, 16, code=0.9, prose=0.1), 0)
    batch = stream.batch(0, 137)
    served: dict[str, Any] = dict.fromkeys(stream.sources, 0)
    for source in batch.source_B:
        served[stream.sources[source]] += 16
    assert stream.ledger(137) == served
    assert sum(stream.ledger(10**12).values()) == 16 * 10**12
    assert stream.epochs(137)["code"] == served["code"] / TokenStore(folder / "code").num_tokens


def test_validation_covers_the_split_once(folder: Path, tmp_path: Path, caplog: Any) -> None:
    write_store(tmp_path / "code", [[1, 2, 3]])
    write_store(tmp_path / "held", [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32, 33]])
    concatenated = Stream(config(tmp_path, 4, "concatenated", code=1), 0)
    with caplog.at_level(logging.WARNING):
        batches = concatenated.validation(99)["code"]
    assert "has 3 sequences of 4 tokens, fewer than the 99" in caplog.text
    assert [batch.tokens_BL.tolist() for batch in batches] == [
        [[10, 11, 12, 13]],
        [[14, 20, 21, 30]],
        [[31, 32, 33, 10]],
    ]
    assert batches[2].targets_BL.tolist() == [[32, 33, IGNORE, IGNORE]]
    targets = np.concatenate([batch.targets_BL.reshape(-1) for batch in batches])
    assert targets[targets != IGNORE].tolist() == [11, 12, 13, 14, 20, 21, 30, 31, 32, 33]

    packed = Stream(config(tmp_path, 4, code=1), 0)
    same(packed.validation(3)["code"][1], packed.validation(1)["code"][0])
    targets = np.concatenate([b.targets_BL.reshape(-1) for b in packed.validation(3)["code"]])
    assert targets[targets != IGNORE].tolist() == [11, 12, 13, 14, 21, 31, 32, 33]
    caplog.clear()
    packed.validation(3)
    assert not caplog.records


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_held_out_sequences_are_spread_evenly(tmp_path: Path, rows: int) -> None:
    write_store(tmp_path / "code", [[1, 2, 3]])
    write_store(tmp_path / "held", [np.arange(100, 201)])
    batches = Stream(config(tmp_path, 10, code=1), 0).validation(4, rows)["code"]
    begins = np.concatenate([b.tokens_BL[(b.targets_BL != IGNORE).any(1), 0] for b in batches])
    assert begins.tolist() == [110, 130, 160, 180]
    assert all(len(batch.tokens_BL) == rows for batch in batches)


def test_validation_smaller_than_a_sequence(tmp_path: Path) -> None:
    write_store(tmp_path / "code", [[1, 2, 3]])
    write_store(tmp_path / "held", [[10, 11], [12, 13, 14]])
    (batch,) = Stream(config(tmp_path, 12, code=1), 0).validation(5)["code"]
    assert batch.targets_BL[0].tolist() == [11, IGNORE, 13, 14] + [IGNORE] * 8


def test_sources_without_held_out_tokens_are_left_out(folder: Path) -> None:
    assert Stream(config(folder, 4, code=1), 0).validation(3) == {}


def test_nothing_to_predict(tmp_path: Path) -> None:
    write_store(tmp_path / "code", [[1], [2], [3]])
    with pytest.raises(UserError, match="no document of two tokens"):
        Stream(config(tmp_path, 4, code=1), 0)
    Stream(config(tmp_path, 4, "concatenated", code=1), 0).batch(0, 2)


def test_describe_names_the_files(folder: Path) -> None:
    described = Stream(config(folder, 4, code=3, prose=1), 9).describe()
    assert described["sources"]["code"]["share"] == 0.75
    assert described["sources"]["code"]["train"]["tokens"] == TokenStore(folder / "code").num_tokens
