"""The ledger of read tokens, exhausted sources, and continuation after another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import DocumentData, SequenceData
from allometry.configs.errors import UserError
from allometry.data.shuffle import Shuffle
from allometry.data.stream import Stream, open_stream
from allometry.data.synthetic import write_store
from stores import sources, write_two_sources

SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("stores"))


def config(
    folder: Path, length: int = 16, max_epochs: float | None = None, **weights: float
) -> SequenceData:
    described = [one | {"max_epochs": max_epochs} for one in sources(folder, **weights)]
    return SequenceData.model_validate({"sequence_length": length, "sources": described})


def documents(folder: Path, length: int, limit: int, **weights: float) -> DocumentData:
    return DocumentData.model_validate(
        {
            "kind": "documents",
            "sequence_length": length,
            "max_document_tokens": limit,
            "sources": sources(folder, **weights),
        }
    )


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(state))
    return loaded


@settings(max_examples=30)
@given(st.integers(1, 700), st.text(max_size=3))
def test_shuffle_has_an_inverse(size: int, key: str) -> None:
    shuffle = Shuffle(key, size)
    assert [shuffle.inverse(shuffle(k)) for k in range(size)] == list(range(size))


@settings(max_examples=60)
@given(st.integers(1, 600), st.integers(0, 2**20))
def test_unique_tokens_are_counted_exactly(folder: Path, length: int, seed: int) -> None:
    """Every token of the store is unique, so the set of tokens read is the reference."""
    stream = Stream(config(folder, length, code=1), seed)
    seen: set[int] = set()
    samples = 2 * -(-stream.stores[0].num_tokens // length) + 2
    for sample in range(samples):
        account = stream.accounts(sample)["code"]
        assert account.unique_tokens == len(seen)
        assert account.tokens == sample * length
        assert account.samples == sample
        seen.update(stream.batch(sample, 1).tokens_BL.reshape(-1).tolist())


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 30))
def test_unique_tokens_of_documents(folder: Path, length: int, limit: int) -> None:
    stream = open_stream(documents(folder, length, limit, code=1), SEED)
    assert not isinstance(stream, Stream)
    seen: set[int] = set()
    for sample in range(2 * -(-stream.stores[0].num_tokens // length) + 2):
        assert stream.accounts(sample)["code"].unique_tokens == len(seen)
        pieces = stream.pieces(sample, 1)
        for piece in range(len(pieces)):
            seen.update(pieces.read(piece)[0].tolist())


def test_ledger_is_one_number_seen_from_two_sides(folder: Path) -> None:
    stream = Stream(config(folder, code=3, prose=1), SEED)
    accounts = stream.accounts(60)
    assert {name: one.tokens for name, one in accounts.items()} == stream.ledger(60)
    assert {name: one.epochs for name, one in accounts.items()} == stream.epochs(60)
    assert stream.state(60)["ledger"]["code"]["tokens"] == 45 * 16


@pytest.mark.parametrize("kind", ["sequences", "documents"])
def test_a_child_goes_on_after_its_ancestors(folder: Path, kind: str) -> None:
    data = {
        "sequences": config(folder, 8, code=1, prose=1),
        "documents": documents(folder, 8, 11, code=1, prose=1),
    }[kind]
    parent = open_stream(data, SEED)
    ancestor = {
        "run": "runs/parent",
        "data": parent.fingerprints(),
        "reading": through_json(parent.state(21)),
    }
    only = data.model_copy(update={"sources": data.sources[:1]})
    child = open_stream(only, SEED).after([ancestor])
    alone = open_stream(only, SEED)
    assert child.starts.tolist() == [11]
    for position in (0, 3, 90):
        _, index = child.samples(position, 5)
        assert index.tolist() == [11 + position + k for k in range(5)]
        if isinstance(child, Stream) and isinstance(alone, Stream):
            after = alone.batch(position + 11, 5).tokens_BL
            np.testing.assert_array_equal(child.batch(position, 5).tokens_BL, after)
        account, whole = child.accounts(position)["code"], alone.accounts(position + 11)["code"]
        assert (account.epochs, account.samples) == (whole.epochs, whole.samples)
        before = alone.accounts(11)["code"]
        assert account.tokens == whole.tokens - before.tokens
        assert account.unique_tokens == whole.unique_tokens - before.unique_tokens
    # A grandchild counts from the furthest ancestor; its own checkpoints store its start.
    later = through_json(child.state(9))
    again = open_stream(only, SEED).after([ancestor | {"reading": later}, ancestor])
    assert again.starts.tolist() == [20]
    resumed = open_stream(only, SEED).resumed(later, 9)
    np.testing.assert_array_equal(resumed.samples(9, 20), child.samples(9, 20))


def test_what_cannot_be_gone_on_with_is_said(folder: Path, tmp_path: Path) -> None:
    parent = Stream(config(folder, code=1), SEED)
    ancestor = {"run": "runs/parent", "data": parent.fingerprints(), "reading": parent.state(5)}
    with pytest.raises(UserError, match="no run is known"):
        parent.after([])
    with pytest.raises(UserError, match=r"run.seed=5.*here run.seed=6"):
        Stream(config(folder, code=1), 6).after([ancestor])
    with pytest.raises(UserError, match=r"as another data\.kind"):
        open_stream(documents(folder, 16, 11, code=1), SEED).after([ancestor])
    with pytest.raises(UserError, match="does not say how much"):
        parent.after([{"run": "r", "data": parent.fingerprints()}])
    renamed = [{"name": "other", "train": str(folder / "code")}]
    data = SequenceData.model_validate({"sequence_length": 16, "sources": renamed})
    with pytest.raises(UserError, match=r"'other'.* under the name 'code'"):
        Stream(data, SEED).after([ancestor])
    # A source that was declared and never read has no effect.
    unread = ancestor | {"reading": parent.state(0)}
    assert Stream(data, SEED).after([unread]).starts.tolist() == [0]
    # A different corpus starts at its beginning.
    assert Stream(config(folder, prose=1), SEED).after([ancestor]).starts.tolist() == [0]


def test_a_source_that_runs_dry_is_named_before_the_run(tmp_path: Path) -> None:
    write_store(tmp_path / "code", [[1] * 50] * 20)
    write_store(tmp_path / "prose", [[1] * 50] * 400)
    stream = Stream(config(tmp_path, 10, max_epochs=1, code=1, prose=1), SEED)
    stream.check_run(200)  # 100 samples of code: each token once
    with pytest.raises(UserError) as caught:
        stream.check_run(300)
    said = str(caught.value)
    assert "'code' runs dry after 2000 of the run's 3000 tokens" in said
    assert "it has 1000 tokens" in said
    assert "max_epochs=1" in said
    assert "wants 1500 tokens" in said
    twice = Stream(config(tmp_path, 10, max_epochs=1.5, code=1, prose=1), SEED)
    twice.check_run(300)
    with pytest.raises(UserError, match=r"max_epochs=1\.5"):
        twice.check_run(302)
    # Tokens read by ancestors count, and the remainder after an edit.
    parent = {"run": "r", "data": stream.fingerprints(), "reading": stream.state(100)}
    with pytest.raises(UserError, match="500 tokens of it after the 510 that runs before"):
        Stream(config(tmp_path, 10, max_epochs=1, code=1, prose=1), SEED).after(
            [parent | {"reading": stream.state(102)}]
        ).check_run(100)
    stream.after([parent]).check_run(100)
    fewer = Stream(config(tmp_path, 10, max_epochs=1, code=1, prose=9), SEED)
    fewer.resumed(through_json(stream.state(100)), 100).check_run(500)


def test_a_change_past_the_end_is_refused(folder: Path) -> None:
    data = config(folder, 10, code=1, prose=1).model_dump()
    changes = [{"after_tokens": 1000, "ratio": 0.2}]
    data["replay"] = {"ratio": 0.1, "sources": ["prose"], "changes": changes}
    stream = Stream(SequenceData.model_validate(data), SEED)
    stream.check_run(101)
    with pytest.raises(UserError, match="after_tokens=1000 is past the end of the run"):
        stream.check_run(100)


def test_a_source_that_was_read_may_not_vanish(folder: Path) -> None:
    state = through_json(Stream(config(folder, code=1, prose=1), SEED).state(10))
    with pytest.raises(UserError, match="no 'prose', of which this run has read 80 tokens"):
        Stream(config(folder, code=1), SEED).resumed(state, 10)
    kept = Stream(config(folder, code=1, prose=0), SEED).resumed(state, 10)
    assert kept.samples(10, 20)[0].tolist() == [0] * 20
    assert kept.ledger(30)["prose"] == 80
    # A source that was declared and never read is allowed.
    unread = through_json(Stream(config(folder, code=1, prose=0), SEED).state(10))
    Stream(config(folder, code=1), SEED).resumed(unread, 10)


@settings(max_examples=40)
@given(
    position=st.integers(0, 60),
    samples=st.integers(1, 60),
    later=st.integers(0, 60),
    more=st.integers(0, 9),
)
def test_samples_that_are_passed_over_are_never_read(
    folder: Path, position: int, samples: int, later: int, more: int
) -> None:
    """The stream continues as if it had read the skipped samples, but the ledger omits them."""
    weights = {"code": 3.0, "prose": 1.0}
    for data in (config(folder, **weights), documents(folder, 16, 24, **weights)):
        plain = open_stream(data, SEED)
        passing = plain.passing_over(position, samples)
        if more:
            passing = passing.passing_over(position, more)
        place, end = position + later, position + samples + more
        for one, other in zip(
            passing.samples(place, 9), plain.samples(end + later, 9), strict=True
        ):
            assert one.tolist() == other.tolist()
        if position:
            mine, whole = passing.samples(0, position + 1), plain.samples(0, position)
            assert [x[:position].tolist() for x in mine] == [x.tolist() for x in whole]
        before, after = plain.ledger(position), plain.ledger(end)
        wanted = {
            name: tokens - after[name] + before[name]
            for name, tokens in plain.ledger(end + later).items()
        }
        assert passing.ledger(place) == wanted
        resumed = plain.resumed(through_json(passing.state(place + 1)), place + 1)
        assert resumed.mixture.changes == passing.mixture.changes
        assert resumed.ledger(place + 30) == passing.ledger(place + 30)
        unique = passing.accounts(place)
        assert all(one.unique_tokens <= one.tokens for one in unique.values())
