"""Expected squared document lengths against those that a run reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from allometry.configs.data import DocumentData, SequenceData
from allometry.data.documents import DocumentStream
from allometry.data.stream import Stream
from allometry.data.synthetic import write_store
from stores import sources

SAMPLES = 6000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for name, longest in (("code", 90), ("prose", 12)):
        lengths = rng.integers(1, longest, 300)
        write_store(made / name, [np.ones(n, np.int64) for n in lengths])
    return made


def description(folder: Path, **more: Any) -> dict[str, Any]:
    return {"sequence_length": 24, "sources": sources(folder, code=2, prose=1), **more}


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_of_sequences(folder: Path, packing: str) -> None:
    stream = Stream(SequenceData.model_validate(description(folder, packing=packing)), seed=1)
    batch = stream.batch(0, SAMPLES)
    lengths = np.full(SAMPLES, 24) if batch.documents is None else batch.documents.lengths
    read = float(np.square(lengths).sum() / batch.num_tokens)
    assert stream.squared_lengths_per_token() == pytest.approx(read, rel=0.01)
    assert (read < 20.0) == (packing == "per_document")


@pytest.mark.parametrize("limit", [24, 40, 200])
def test_of_whole_documents(folder: Path, limit: int) -> None:
    data = description(folder, kind="documents", max_document_tokens=limit)
    stream = DocumentStream(DocumentData.model_validate(data), seed=1)
    pieces = stream.pieces(0, SAMPLES)
    read = float(np.square(pieces.lengths).sum() / pieces.num_tokens)
    assert stream.squared_lengths_per_token() == pytest.approx(read, rel=0.01)


def test_squares_of_documents_longer_than_float32_counts() -> None:
    lengths = np.array([2**24 + 3], np.int32)
    stream = object.__new__(DocumentStream)
    stream.max_document_tokens = 2**24
    stream._train = [SimpleNamespace(store=SimpleNamespace(lengths=lengths))]  # type: ignore[list-item]
    assert stream._epoch_squares(0) == 2.0**48 + 9
