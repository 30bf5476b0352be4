"""Stages with different sample lengths: no token is lost or repeated, and the ledger is exact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.data import DocumentData, SequenceData
from allometry.data.batch import IGNORE
from allometry.data.changes import DataStage
from allometry.data.documents import DocumentStream
from allometry.data.store import TokenStore
from allometry.data.stream import Stream, open_stream
from stores import sources, write_two_sources

SEED = 5
NAMES = ("code", "prose")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_sources(tmp_path_factory.mktemp("stores"))


@st.composite
def plans(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw stages: number of samples, length, weights and document limit."""
    return [
        {
            "samples": draw(st.integers(1, 40)),
            "length": draw(st.integers(1, 60)),
            "limit": draw(st.integers(1, 30)),
            "weights": draw(st.sampled_from([(1, 0), (0, 1), (1, 1), (3, 1)])),
        }
        for _ in range(draw(st.integers(1, 4)))
    ]


def described(folder: Path, stage: dict[str, Any], kind: str) -> SequenceData | DocumentData:
    plain = {
        "sequence_length": stage["length"],
        "sources": sources(folder, **dict(zip(NAMES, stage["weights"], strict=True))),
    }
    if kind == "sequences":
        return SequenceData.model_validate(plain)
    plain |= {"kind": "documents", "max_document_tokens": stage["limit"]}
    return DocumentData.model_validate(plain)


def staged(folder: Path, plan: list[dict[str, Any]], kind: str) -> list[DataStage]:
    stages, position = [], 0
    for number, stage in enumerate(plan):
        data = described(folder, stage, kind)
        stages.append(DataStage(data, position, stage["samples"], str(number)))
        position += stage["samples"]
    return stages


def read(stream: Stream | DocumentStream, position: int) -> tuple[list[int], list[int]]:
    """Return the tokens and targets of one sample."""
    if isinstance(stream, Stream):
        batch = stream.batch(position, 1)
        return batch.tokens_BL.reshape(-1).tolist(), batch.targets_BL.reshape(-1).tolist()
    pieces = stream.pieces(position, 1)
    both = [pieces.read(piece) for piece in range(len(pieces))]
    tokens, targets = ([x for pair in both for x in pair[k].tolist()] for k in (0, 1))
    return tokens, targets


def last_tokens(folder: Path) -> set[int]:
    ends = set()
    for name in NAMES:
        store = TokenStore(folder / name)
        for document in np.flatnonzero(store.lengths).tolist():
            ends.add(int(store.read(document)[-1]))
    return ends


@pytest.mark.parametrize("kind", ["sequences", "documents"])
@settings(max_examples=15)
@given(plan=plans(), more=st.integers(0, 120))
def test_every_token_is_read_once_an_epoch_whatever_the_lengths(
    folder: Path, kind: str, plan: list[dict[str, Any]], more: int
) -> None:
    stages = staged(folder, plan, kind)
    whole = open_stream(stages[0].data, SEED, stages)
    ends, counts = last_tokens(folder), Counter[int]()
    seen: dict[str, list[int]] = {name: [] for name in NAMES}
    plan[-1]["samples"] += more
    position = 0
    for number, stage in enumerate(plan):
        stream = whole.in_stage(number)
        for _ in range(stage["samples"]):
            tokens, targets = read(stream, position)
            for token, target in zip(tokens, targets, strict=True):
                last = token in ends
                assert target == (IGNORE if last else token + 1)
            counts.update(tokens)
            for name, first, stop in (("code", 1, 30000), ("prose", 30000, 10**6)):
                seen[name] += [token for token in tokens if first <= token < stop]
            position += 1
            if position % 7 == 0 or position < 4:
                for name, account in stream.accounts(position).items():
                    assert account.tokens == len(seen[name])
                    assert account.unique_tokens == len(set(seen[name]))
    overhang = sum(stage["length"] for stage in plan) if kind == "sequences" else 0
    for number, name in enumerate(NAMES):
        account = whole.accounts(position)[name]
        mine = [counts[token] for token in set(seen[name])]
        assert account.tokens == len(seen[name])
        assert account.unique_tokens == len(mine)
        if account.epochs < 1:  # before one epoch, only overlaps repeat tokens
            assert account.tokens - account.unique_tokens <= overhang
        if kind == "documents":
            assert not mine or max(mine) - account.epochs < 1.5
        length = whole.stores[number].num_tokens
        if kind == "sequences" and account.tokens >= length + overhang:
            assert account.unique_tokens == length


@pytest.mark.parametrize("kind", ["sequences", "documents"])
def test_stages_of_one_length_are_one_run(folder: Path, kind: str) -> None:
    stage = {"samples": 13, "length": 8, "limit": 11, "weights": (3, 1)}
    stages = staged(folder, [stage, stage, stage], kind)
    whole = open_stream(stages[0].data, SEED, stages)
    plain = open_stream(stages[0].data, SEED)
    assert whole.mixture.changes == plain.mixture.changes
    for position in (0, 12, 13, 30):
        assert read(whole.in_stage(position // 13), position) == read(plain, position)


@pytest.mark.parametrize("kind", ["sequences", "documents"])
def test_a_length_that_is_edited_in_is_the_one_that_was_declared(folder: Path, kind: str) -> None:
    """Equals bitwise a run declared so from the start, through a checkpoint's JSON; a child too."""
    first = {"samples": 17, "length": 8, "limit": 11, "weights": (3, 1)}
    second = {"samples": 30, "length": 30, "limit": 7, "weights": (1, 1)}
    known = staged(folder, [first, second], kind)
    declared = open_stream(known[0].data, SEED, known).in_stage(1)
    before = open_stream(known[0].data, SEED)
    state = json.loads(json.dumps(before.state(17)))
    resumed = open_stream(known[1].data, SEED, known).resumed(state, 17).in_stage(1)
    assert resumed.mixture.changes == declared.mixture.changes
    old = {key: value for key, value in state.items() if key != "parts"}  # as in older checkpoints
    old["mixture"] = [{k: c[k] for k in ("position", "shares")} for c in state["mixture"]]
    older = open_stream(known[1].data, SEED, known).resumed(old, 17).in_stage(1)
    for position in (17, 18, 40):
        assert read(resumed, position) == read(declared, position)
        assert read(older, position) == read(declared, position)
    assert resumed.accounts(45) == declared.accounts(45)
    # A child run reads the remaining tokens, at its own length.
    state = json.loads(json.dumps(declared.state(40)))
    ancestor = {"run": "r", "data": declared.fingerprints(), "reading": state}
    child = open_stream(described(folder, first | {"length": 5}, kind), SEED).after([ancestor])
    tokens = [token for k in range(40) for token in read(declared.in_stage(int(k >= 17)), k)[0]]
    tokens += [token for k in range(8) for token in read(child, k)[0]]
    for name, account in child.accounts(8).items():
        mine = [t for t in tokens if (t < 30000) == (name == "code")]
        both = declared.accounts(40)[name].unique_tokens + account.unique_tokens
        assert both == len(set(mine))
        if kind == "sequences":
            epoch = child.stores[NAMES.index(name)].num_tokens
            assert account.epochs == pytest.approx(len(mine) / epoch)
