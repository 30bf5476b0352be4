import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.data.batch import IGNORE
from allometry.data.documents import DocumentStream, Pieces, PieceStream
from allometry.data.order import DocumentOrder, permutation
from allometry.data.store import TokenStore
from allometry.data.stream import Stream, open_stream
from allometry.data.synthetic import write_index, write_store
from stores import sources, write_two_sources

SEED = 7
Piece = tuple[list[int], list[int]]


def config(folder: Path, length: int, limit: int, **weights: float) -> DocumentData:
    sizes = {"sequence_length": length, "max_document_tokens": limit}
    return DocumentData.model_validate({**sizes, "sources": sources(folder, **weights)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("stores"))


def plain_pieces(store: TokenStore, name: str, limit: int) -> Iterator[tuple[int, Piece]]:
    """Reference for the endless sequence: start, tokens and targets of each piece."""
    place = 0
    for epoch in itertools.count():
        for document in permutation(f"{SEED}:{name}:{epoch}", store.num_documents):
            tokens = store.read(int(document)).tolist()
            for start in range(0, len(tokens), limit):
                piece = tokens[start : start + limit]
                targets = [*tokens[start + 1 : start + limit + 1], IGNORE][: len(piece)]
                if targets != [IGNORE]:
                    yield place + start, (piece, targets)
            place += len(tokens)


def plain_sample(
    stream: DocumentStream, source: int, index: int, limit: int, length: int
) -> list[Piece]:
    line = plain_pieces(stream.stores[source], stream.sources[source], limit)
    start, stop = index * length, (index + 1) * length
    before_stop = itertools.takewhile(lambda found: found[0] < stop, line)
    return [piece for place, piece in before_stop if place >= start]


def contents(pieces: Pieces) -> list[Piece]:
    read = [pieces.read(i) for i in range(len(pieces))]
    return [(tokens.tolist(), targets.tolist()) for tokens, targets in read]


def same(a: Pieces, b: Pieces) -> None:
    for column in ("lengths", "sources", "documents", "offsets", "ends"):
        np.testing.assert_array_equal(getattr(a, column), getattr(b, column))


@pytest.mark.parametrize("length", [1, 7, 16, 501])
@pytest.mark.parametrize("limit", [1, 2, 5, 11, 64])
def test_pieces_follow_the_definition(folder: Path, length: int, limit: int) -> None:
    stream = DocumentStream(config(folder, length, limit, code=2, prose=1), SEED)
    first, count = 3, 12
    pieces = stream.pieces(first, count)
    expected: list[Piece] = []
    sources: list[int] = []
    for position in range(first, first + count):
        source, index = stream.mixture.source(position)
        sample = plain_sample(stream, source, index, limit, length)
        expected += sample
        sources += [source] * len(sample)
    assert contents(pieces) == expected
    assert pieces.sources.tolist() == sources
    assert pieces.lengths.tolist() == [len(tokens) for tokens, _ in expected]
    assert pieces.lengths.dtype == pieces.sources.dtype == np.int64
    assert len(pieces) == len(expected)
    assert pieces.num_tokens == sum(len(tokens) for tokens, _ in expected)
    assert pieces.num_targets == sum(t != IGNORE for _, targets in expected for t in targets)


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.integers(1, 12), st.integers(1, 40), st.integers(1, 30))
def test_a_step_is_its_samples(
    folder: Path, position: int, count: int, length: int, limit: int
) -> None:
    data = config(folder, length, limit, code=0.7, prose=0.3)
    stream, other = DocumentStream(data, 3), DocumentStream(data, 3)
    whole = stream.pieces(position, count)
    singles = [other.pieces(position + k, 1) for k in reversed(range(count))][::-1]
    for column in ("lengths", "sources", "documents", "offsets", "ends"):
        parts = np.concatenate([getattr(single, column) for single in singles])
        np.testing.assert_array_equal(getattr(whole, column), parts)
    assert contents(whole) == [piece for single in singles for piece in contents(single)]
    same(stream.pieces(position, count), whole)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 3), st.data())
def test_every_document_of_an_epoch_comes_once_and_whole(
    folder: Path, length: int, limit: int, epochs: int, data: st.DataObject
) -> None:
    stream = DocumentStream(config(folder, length, limit, code=1), SEED)
    store = stream.stores[0]
    samples = -(-epochs * store.num_tokens // length)
    cuts = data.draw(st.lists(st.integers(0, samples), max_size=4))
    bounds = sorted({0, samples, *cuts})
    served: list[tuple[int, int, int]] = []
    for begin, end in itertools.pairwise(bounds):
        found = stream.pieces(begin, end - begin)
        columns = (found.documents, found.offsets, found.lengths)
        served += zip(*(column.tolist() for column in columns), strict=True)
    for epoch in range(epochs):
        expected = []
        for document in permutation(f"{SEED}:code:{epoch}", store.num_documents).tolist():
            size = int(store.lengths[document])
            cut = [(document, at, min(limit, size - at)) for at in range(0, size, limit)]
            expected += [piece for piece in cut if piece[1] + 1 < size]
        assert served[: len(expected)] == expected
        del served[: len(expected)]
    # The last window may begin pieces of the following epoch.
    assert sum(size for _, _, size in served) <= length + limit


@settings(max_examples=80)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 400))
def test_the_ledger_is_a_brute_force_count(
    folder: Path, length: int, limit: int, position: int
) -> None:
    stream = DocumentStream(config(folder, length, limit, code=0.9, prose=0.1), SEED)
    served: dict[str, Any] = dict.fromkeys(stream.sources, 0)
    if position:
        pieces = stream.pieces(0, position)
        for source, size in zip(pieces.sources.tolist(), pieces.lengths.tolist(), strict=True):
            served[stream.sources[source]] += size
    assert stream.ledger(position) == served
    assert stream.tokens(position) == sum(served.values())
    assert stream.epochs(position)["prose"] * stream._epoch_tokens(1) == pytest.approx(
        served["prose"]
    )


@pytest.mark.parametrize("limit", [1, 2, 5, 22, 100])
def test_tokens_before_a_place_grow_where_pieces_begin(folder: Path, limit: int) -> None:
    store = TokenStore(folder / "code")
    line = PieceStream(DocumentOrder(store, "code", SEED), limit)
    end = 2 * store.num_tokens + 9
    growth = np.diff([line.tokens_before(place) for place in range(end + 1)])
    expected = np.zeros(end, np.int64)
    for place, (tokens, _) in plain_pieces(store, "code", limit):
        if place >= end:
            break
        expected[place] = len(tokens)
    np.testing.assert_array_equal(growth, expected)
    assert line.tokens_before(10**12 * store.num_tokens) == 10**12 * line.epoch_tokens


def test_each_pair_of_neighbours_is_a_target_once_an_epoch(folder: Path) -> None:
    stream = DocumentStream(config(folder, 16, 5, code=1), SEED)
    store = stream.stores[0]
    pieces = stream.pieces(0, -(-store.num_tokens // 16))
    pairs = [
        pair for tokens, targets in contents(pieces) for pair in zip(tokens, targets, strict=True)
    ]
    counted = [pair for pair in pairs if pair[1] != IGNORE]
    expected = {
        (int(a), int(b))
        for document in range(store.num_documents)
        for a, b in itertools.pairwise(store.read(document))
    }
    assert set(counted) >= expected
    assert len(set(counted)) == len(expected)
    assert counted[: len(expected)] == list(dict.fromkeys(counted))  # followed by the next epoch


def test_parts_of_a_piece_are_read_alone(folder: Path) -> None:
    pieces = DocumentStream(config(folder, 16, 5, code=1, prose=1), SEED).pieces(0, 20)
    for i, size in enumerate(pieces.lengths.tolist()):
        tokens, targets = pieces.read(i)
        assert tokens.dtype == targets.dtype == np.int64
        assert not np.shares_memory(tokens, targets)
        for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
            part = pieces.read(i, start, stop)
            np.testing.assert_array_equal(part[0], tokens[start:stop])
            np.testing.assert_array_equal(part[1], targets[start:stop])


def test_another_source_does_not_change_a_source(folder: Path) -> None:
    both = DocumentStream(config(folder, 16, 9, code=1, prose=1), 5).pieces(0, 40)
    alone = DocumentStream(config(folder, 16, 9, code=1), 5).pieces(0, 20)
    code = both.sources == 0
    np.testing.assert_array_equal(both.documents[code], alone.documents)
    np.testing.assert_array_equal(both.offsets[code], alone.offsets)
    other_seed = DocumentStream(config(folder, 16, 9, code=1), 6).pieces(0, 20)
    assert other_seed.documents.tolist() != alone.documents.tolist()


def test_the_mixture_gives_each_source_its_share_of_windows(folder: Path) -> None:
    stream = DocumentStream(config(folder, 16, 5, code=3, prose=1), SEED)
    ledger = stream.ledger(4000)
    for name, windows in (("code", 3000), ("prose", 1000)):
        source = stream.sources.index(name)
        share = stream._epoch_tokens(source) / stream.stores[source].num_tokens
        assert ledger[name] == pytest.approx(16 * windows * share, rel=0.01)


def test_a_window_inside_a_long_document_holds_nothing(tmp_path: Path) -> None:
    write_store(tmp_path / "long", [np.arange(100)])
    stream = DocumentStream(config(tmp_path, 10, 1000, long=1), SEED)
    assert [len(stream.pieces(k, 1)) for k in range(11)] == [1, *[0] * 9, 1]
    assert stream.pieces(3, 2).num_targets == 0
    assert stream.pieces(0, 10).lengths.tolist() == [100]
    assert stream.ledger(1) == stream.ledger(10) == {"long": 100}


def test_validation_is_the_documents_as_stored(tmp_path: Path, caplog: Any) -> None:
    write_store(tmp_path / "code", [[1, 2, 3]])
    write_store(tmp_path / "prose", [[4, 5, 6]])
    write_store(tmp_path / "held", [[10, 11, 12, 13, 14], [20], [30, 31, 32, 33]])
    stream = DocumentStream(config(tmp_path, 4, 4, code=1, prose=1), 0)
    with caplog.at_level(logging.WARNING):
        found = stream.validation_pieces(99)
    assert "has 3 sequences of 4 tokens, fewer than the 99" in caplog.text
    assert list(found) == ["code", "prose"]
    # Five tokens become a piece of four and a remainder without targets; so does a document of one.
    expected = [([10, 11, 12, 13], [11, 12, 13, 14]), ([30, 31, 32, 33], [31, 32, 33, IGNORE])]
    for source, pieces in enumerate(found.values()):
        assert contents(pieces) == expected
        assert pieces.sources.tolist() == [source] * 2
    assert contents(stream.validation_pieces(1)["code"]) == expected[1:]
    caplog.clear()
    stream.validation_pieces(3)
    assert not caplog.records


def test_held_out_documents_are_spread_evenly(tmp_path: Path) -> None:
    write_store(tmp_path / "code", [[1, 2, 3]])
    write_store(tmp_path / "held", [[k, k + 1] for k in range(100, 200, 2)] + [[7]] * 20)
    stream = DocumentStream(config(tmp_path, 12, 4, code=1), 0)
    # 120 tokens are 10 windows; a document of one token has no target.
    chosen = [tokens[0] for tokens, _ in contents(stream.validation_pieces(2)["code"])]
    assert chosen == [104, 114, 124, 134, 144, 154, 164, 174, 184, 194]
    write_store(tmp_path / "held", [[1], [2], [3, 4]])
    stream = DocumentStream(config(tmp_path, 2, 4, code=1), 0)
    assert stream.validation_pieces(1)["code"].num_targets == 1


def test_documents_of_one_token_alone_are_an_error(tmp_path: Path) -> None:
    write_store(tmp_path / "code", [[1], [2], [3]])
    with pytest.raises(UserError, match="no document of two tokens"):
        DocumentStream(config(tmp_path, 4, 4, code=1), 0)


def test_a_stream_of_the_kind_that_is_asked_for(folder: Path) -> None:
    documents = config(folder, 16, 9, code=1)
    sequences = SequenceData(sequence_length=16, sources=documents.sources)
    assert isinstance(open_stream(sequences, 0), Stream)
    stream = open_stream(documents, 0)
    assert isinstance(stream, DocumentStream)
    described = stream.describe()
    assert described["kind"] == "documents"
    assert described["max_document_tokens"] == 9
    assert described["sources"]["code"]["train"]["tokens"] == TokenStore(folder / "code").num_tokens
    assert open_stream(sequences, 0).tokens(5) == 5 * 16
    assert stream.fingerprints() == open_stream(sequences, 0).fingerprints()


def test_ten_thousand_documents_are_found_without_reading_them(tmp_path: Path) -> None:
    """The tokens are a hole in a sparse file; a loop over documents would take seconds."""
    lengths = np.random.default_rng(0).geometric(1 / 800, 200_000)
    write_index(tmp_path / "many.idx", "uint16", lengths)
    with (tmp_path / "many.bin").open("wb") as file:
        file.truncate(2 * int(lengths.sum()))
    stream = DocumentStream(config(tmp_path, 8192, 100_000, many=1), 0)
    stream.pieces(0, 1)  # computes the epoch's permutation
    begin = time.process_time()  # independent of other load
    pieces = stream.pieces(1000, 1000)
    taken = time.process_time() - begin
    assert len(pieces) > 9000
    assert taken < 0.5  # milliseconds on an idle core
    assert stream.ledger(2000)["many"] - stream.ledger(1000)["many"] == pieces.num_tokens
