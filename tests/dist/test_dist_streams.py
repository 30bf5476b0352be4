"""Parallel streams (ParScale) in parallel layouts: one process's gradients in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import test_dist_documents as documents
import tiny
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store
from allometry.parallel.mesh import open_mesh
from allometry.studies.memory.probe import Measured, predicted, probe
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
        {("dense", "tp2"), ("tied", "pp2")},
        tuple(MODELS),
        tuple(PLACES),
    ),
)
def test_gradients_of_dense_models(run_ranks: RunRanks, model: str, layout: str) -> None:
    world_size, settings = PLACES[layout]
    check(run_ranks, world_size, MODELS[model], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERTS)
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
def test_misplaced_documents_would_be_found(run_ranks: RunRanks, store: str) -> None:
    """Negative control: other positions of the tokens on a ring change the gradients."""
    config = documents.config(store, MODELS["dense"])
    assert max(run_ranks(documents.errors, 5, config, documents.MIXED, True)) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory_is_predicted_within_a_tenth(run_ranks: RunRanks, dtype: str, ranks: int) -> None:
    model = {
        "kind": "dense",
        "vocab_size": 512,
        "width": 96,
        "num_layers": 3,
        "num_heads": 6,
        "num_kv_heads": 2,
        "ffn_width": 256,
        "streams": {"count": 2, "prefix_tokens": 16},
    }
    config = RunConfig.model_validate(
        {
            "run": {"folder": "none"},
            "model": model,
            "data": {"sequence_length": 128, "sources": [{"name": "random", "train": "none"}]},
            "batch": {"sequences": 8, "micro_batch_sequences": 4},
            "training": {"total_steps": 2, "compute_dtype": dtype, "compile": False},
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "schedule": {"kind": "constant"},
            "parallel": {"zero": {"stage": 3 if ranks > 1 else 0}},
        }
    )
    found = run_ranks(memory, ranks, config)
    fullest = max(found, key=lambda one: one.bytes)
    estimate = predicted(config, ranks, "cpu", fullest.rank)
    assert estimate.total == pytest.approx(fullest.bytes, rel=0.1)


def memory(config: RunConfig) -> Measured:
    """(On each rank) memory of two steps."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        return probe(config, mesh)
