"""Scores stored next to a store, and the stream over a selection of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import DocumentData, Select, SequenceData
from allometry.configs.errors import UserError
from allometry.data.select.kept import kept_documents, select_documents
from allometry.data.select.scores import read_scores, scores_path, write_scores
from allometry.data.store import TokenStore
from allometry.data.stream import open_stream
from allometry.data.synthetic import write_store
from stores import sources, write_two_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_two_sources(tmp_path)
    store = TokenStore(made / "code")
    values = np.random.default_rng(1).normal(size=store.num_documents).round(1)
    values[7] = np.nan
    write_scores(store, "luck", values, {"seed": 1})
    return made


def described(folder: Path, kind: str = "sequences", **select: Any) -> SequenceData | DocumentData:
    listed = sources(folder, code=2, prose=1)
    if select:
        scores = str(scores_path(folder / "code", "luck"))
        listed[0] |= {"select": {"scores": scores, "keep": 0.4, "side": "top"} | select}
    plain: dict[str, Any] = {"sequence_length": 16, "sources": listed}
    if kind == "sequences":
        return SequenceData.model_validate(plain)
    return DocumentData.model_validate(plain | {"kind": kind, "max_document_tokens": 9})


def test_a_file_of_scores_comes_back(folder: Path) -> None:
    store = TokenStore(folder / "code")
    read = read_scores(folder / "code.luck.scores.npy", store)
    assert read.values.dtype == np.float32
    assert np.isnan(read.values).nonzero()[0].tolist() == [7]
    record = json.loads((folder / "code.luck.scores.json").read_text())
    assert record["scorer"] == "luck"
    assert record["settings"] == {"seed": 1}
    assert record["unscored"] == 1
    assert record["store"] == {
        "fingerprint": store.fingerprint,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
    }
    assert not list(folder.glob("*.partial"))


def test_scores_that_are_not_of_the_store_are_refused(folder: Path) -> None:
    store, other = TokenStore(folder / "code"), TokenStore(folder / "prose")
    path = folder / "code.luck.scores.npy"
    with pytest.raises(UserError, match=r"of other documents than token files .*prose hold"):
        read_scores(path, other)
    with pytest.raises(UserError, match=r"code.nn.scores.json, the record .* does not exist"):
        read_scores(folder / "code.nn.scores.npy", store)
    with pytest.raises(UserError, match=r"have 3 values, but .* hold 40 documents"):
        write_scores(store, "few", np.zeros(3), {})
    with pytest.raises(UserError, match="infinite number, of document 2"):
        write_scores(store, "far", np.where(np.arange(40) == 2, 1e39, 0.0), {})
    with pytest.raises(UserError, match="no number at all"):
        write_scores(store, "none", np.full(40, np.nan), {})
    with pytest.raises(UserError, match=r"'a\.b' is no name for a scorer"):
        write_scores(store, "a.b", np.zeros(40), {})
    np.save(path, np.zeros(40, np.float32))
    with pytest.raises(UserError, match="are not those that their record describes"):
        read_scores(path, store)
    np.save(path, np.zeros(40))
    with pytest.raises(UserError, match="hold float64 of shape"):
        read_scores(path, store)
    path.write_bytes(b"\x93NUMPY" + bytes(20))
    with pytest.raises(UserError, match="cannot be read"):
        read_scores(path, store)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        read_scores(path, store)


def plain_kept(values: list[float], lengths: list[int], keep: float, side: str) -> list[int]:
    """Reference: rank the documents and keep them one after another."""
    scored = [d for d, value in enumerate(values) if value == value]
    ranked = sorted(scored, key=lambda d: (-values[d] if side == "top" else values[d], d))
    total = sum(lengths[d] for d in scored)
    first = (1 - keep) / 2 * total if side == "middle" else 0.0
    kept, before = [], 0
    for document in ranked:
        if first <= before < first + keep * total:
            kept.append(document)
        before += lengths[document]
    return sorted(kept)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from([0.0, 1.0, 2.0, -1.5, float("nan")])),
        min_size=1,
        max_size=30,
    ),
    st.floats(0.01, 1.0),
    st.sampled_from(["top", "middle", "bottom"]),
)
def test_what_is_kept_is_the_definition(
    documents: list[tuple[int, float]], keep: float, side: str
) -> None:
    lengths, values = (list(column) for column in zip(*documents, strict=True))
    found = kept_documents(np.array(values, np.float32), np.array(lengths), keep, side)[1]
    assert found.tolist() == plain_kept(values, lengths, keep, side)


def test_ties_go_by_number_and_shares_are_of_tokens() -> None:
    values = np.array([1, 3, 3, 3, 2, 0], np.float32)
    lengths = np.array([5, 10, 10, 10, 5, 60])
    kept = {
        (side, keep): kept_documents(values, lengths, keep, side)[1].tolist()
        for side, keep in (("top", 0.1), ("top", 0.2), ("top", 0.21), ("bottom", 0.6), ("top", 1.0))
    }
    assert kept == {
        ("top", 0.1): [1],
        ("top", 0.2): [1, 2],
        ("top", 0.21): [1, 2, 3],
        ("bottom", 0.6): [5],
        ("top", 1.0): [0, 1, 2, 3, 4, 5],
    }


@pytest.mark.parametrize("kind", ["sequences", "documents"])
@pytest.mark.parametrize("side", ["top", "middle", "bottom"])
def test_the_stream_is_that_of_a_store_of_the_kept_documents(
    folder: Path, tmp_path: Path, kind: str, side: str
) -> None:
    """Equal bitwise and with the same ledger: the stream only knows the kept documents."""
    store = TokenStore(folder / "code")
    select = Select(scores=str(scores_path(folder / "code", "luck")), keep=0.4, side=side)
    kept = select_documents(store, select, "code").documents
    copied = tmp_path / "copied"
    copied.mkdir()
    write_store(copied / "code", [store.read(int(d)) for d in kept])
    prose = TokenStore(folder / "prose")
    write_store(copied / "prose", [prose.read(d) for d in range(prose.num_documents)])
    chosen = open_stream(described(folder, kind, side=side), seed=5)
    plain = open_stream(described(copied, kind), seed=5)
    samples = 80  # several epochs
    for position in range(0, samples, 8):
        if kind == "sequences":
            one, other = (each.batch(position, 8) for each in (chosen, plain))
            np.testing.assert_array_equal(one.tokens_BL, other.tokens_BL)
            np.testing.assert_array_equal(one.targets_BL, other.targets_BL)
        else:
            one, other = (each.pieces(position, 8) for each in (chosen, plain))
            assert len(one) == len(other)
            for piece in range(len(one)):
                for mine, theirs in zip(one.read(piece), other.read(piece), strict=True):
                    np.testing.assert_array_equal(mine, theirs)
        assert chosen.accounts(position + 8) == plain.accounts(position + 8)
    assert chosen.accounts(samples)["code"].epochs > 2
    assert chosen.squared_lengths_per_token() == plain.squared_lengths_per_token()


def test_another_threshold_another_stream_and_none_is_all(folder: Path) -> None:
    whole, top = open_stream(described(folder), 5), open_stream(described(folder, keep=0.4), 5)
    less = open_stream(described(folder, keep=0.2), 5)
    names = [each.fingerprints()["code"] for each in (whole, top, less)]
    assert len(set(names)) == 3
    assert {name.partition(":")[0] for name in names} == {TokenStore(folder / "code").fingerprint}
    assert {each.fingerprints()["prose"] for each in (whole, top, less)} == {
        TokenStore(folder / "prose").fingerprint
    }
    tokens = [each.stores[0].num_tokens for each in (whole, top, less)]
    assert tokens[0] > tokens[1] > tokens[2] > 0
    assert not np.array_equal(whole.batch(0, 8).tokens_BL, top.batch(0, 8).tokens_BL)


def test_held_out_documents_are_never_left_out(folder: Path) -> None:
    write_store(folder / "held", [np.arange(1, 40), np.arange(3, 50)])
    whole, top = open_stream(described(folder), 5), open_stream(described(folder, keep=0.1), 5)
    for one, other in zip(whole.validation(9)["code"], top.validation(9)["code"], strict=True):
        np.testing.assert_array_equal(one.tokens_BL, other.tokens_BL)
        np.testing.assert_array_equal(one.targets_BL, other.targets_BL)


def test_the_record_says_what_was_kept_by_what(folder: Path) -> None:
    stream = open_stream(described(folder, keep=0.3), 5)
    said = json.loads(json.dumps(stream.describe()))["sources"]["code"]
    store = TokenStore(folder / "code")
    assert said["train"]["tokens"] == said["select"]["kept_tokens"] == stream.stores[0].num_tokens
    assert said["select"]["tokens"] == store.num_tokens
    assert said["select"]["scorer"] == "luck"
    assert said["select"]["unscored_documents"] == 1
    values = read_scores(folder / "code.luck.scores.npy", store).values
    low, high = said["select"]["kept_scores"]
    assert high == np.nanmax(values)
    samples = said["select"]["samples"]
    assert len(samples["kept"]) == len(samples["dropped"]) == 4
    assert all(low <= one["score"] <= high for one in samples["kept"])
    assert all(one["score"] <= low for one in samples["dropped"])
    for one in samples["kept"] + samples["dropped"]:
        assert one["tokens"] == store.read(one["document"]).tolist()[:48]
        assert one["score"] == values[one["document"]]


def test_a_selection_that_keeps_nothing_is_refused(folder: Path) -> None:
    write_store(folder / "one", [[1, 2, 3, 4, 5]])
    write_scores(TokenStore(folder / "one"), "luck", np.array([1.0]), {})
    select = {"scores": str(scores_path(folder / "one", "luck")), "keep": 0.5, "side": "middle"}
    plain = {
        "sequence_length": 2,
        "sources": [{"name": "one", "train": str(folder / "one"), "select": select}],
    }
    with pytest.raises(UserError, match=r"select.keep=0.5 of side=middle keeps no token"):
        open_stream(SequenceData.model_validate(plain), 0)


def test_going_on_after_a_run_takes_the_same_selection(folder: Path) -> None:
    parent = open_stream(described(folder, keep=0.4), 5)
    ancestor = {
        "run": "runs/parent",
        "data": parent.fingerprints(),
        "reading": json.loads(json.dumps(parent.state(20))),
    }
    same = open_stream(described(folder, keep=0.4), 5).after([ancestor])
    np.testing.assert_array_equal(same.starts, parent.mixture.counts(20))
    for other in (described(folder, keep=0.5), described(folder, side="bottom"), described(folder)):
        with pytest.raises(UserError, match="read its documents by another select"):
            open_stream(other, 5).after([ancestor])
