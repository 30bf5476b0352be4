"""Parallel streams (ParScale) in parallel layouts: one process's gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_dist_documents as documents
import tiny
from allometry.data.synthetic import write_store
from test_dist_families import PLACES, check
from test_dist_layouts import DENSE, EXPERT_LAYOUTS, MOE
from thinned import thinned

RunRanks = Callable[..., list[Any]]

STREAMS = {"streams": {"count": 3, "prefix_tokens": 4, "smoothing": 0.1}}
GROUPED = {"num_kv_heads": 2}
MODELS = {
    "dense": DENSE | GROUPED | STREAMS,
    "tied": DENSE | GROUPED | STREAMS | {"tied_embeddings": True, "qk_norm_over": "width"},
}
EXPERTS = ("ep2", "ep2-tp2-zero3", "ep2-pp2", "hdp4-ep2-zero2", "whole-tp2")


@pytest.mark.parametrize(
    ("model", "layout"),
    thinned(
        {("dense", "tp2"), ("tied", "pp2"), ("dense", "hdp2-tp2-zero2")},
        tuple(MODELS),
        tuple(PLACES),
    ),
)
def test_gradients_of_dense_models(run_ranks: RunRanks, model: str, layout: str) -> None:
    world_size, settings = PLACES[layout]
    check(run_ranks, world_size, MODELS[model], **settings)


@pytest.mark.parametrize(
    "layout",
    [
        "ep2-pp2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS if n != "ep2-pp2"),
    ],
)
def test_gradients_of_mixtures(run_ranks: RunRanks, layout: str) -> None:
    world_size, settings = EXPERT_LAYOUTS[layout]
    check(run_ranks, world_size, MOE | STREAMS, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    prefix: Path = tmp_path_factory.mktemp("documents") / "store"
    write_store(prefix, [rng.integers(0, tiny.VOCAB, length) for length in documents.LENGTHS])
    return str(prefix)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("hdp2", "dense"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("hdp4-zero3", "dense"), ("hdp2-tp2", "dense"), ("hdp2", "moe"))
        ),
    ],
)
def test_documents_on_a_ring(run_ranks: RunRanks, store: str, layout: str, model: str) -> None:
    world_size, settings = documents.LAYOUTS[layout]
    of_model = MOE | STREAMS if model == "moe" else MODELS["dense"]
    config = documents.config(store, of_model, **settings)
    assert max(run_ranks(documents.errors, world_size, config)) <= 1e-12


@pytest.mark.slow
def test_rings_of_any_ranks(run_ranks: RunRanks, store: str) -> None:
    config = documents.config(store, MODELS["dense"])
    assert max(run_ranks(documents.errors, 5, config, documents.MIXED)) <= 1e-12


@pytest.mark.slow
def test_a_rank_without_its_prefix_gradient_would_be_found(run_ranks: RunRanks, store: str) -> None:
    """Negative control: misplaced positions change the gradients."""
    config = documents.config(store, MODELS["dense"])
    assert max(run_ranks(documents.errors, 5, config, documents.MIXED, True)) > 1e-6
