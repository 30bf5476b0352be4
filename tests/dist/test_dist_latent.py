"""Latent attention in parallel layouts: equal gradients to one process, in fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import test_dist_documents as documents
import tiny
from allometry.configs.errors import UserError
from allometry.data.synthetic import write_store
from allometry.scaling.layout import Layout
from test_dist_families import PLACES, check
from test_dist_layouts import DENSE, EXPERT_LAYOUTS, LATENT, MOE, run
from thinned import thinned

RunRanks = Callable[..., list[Any]]

WIDTHS = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8, "mscale_all_dim": 0.8}
GROUPED = ("num_kv_heads", "head_dim", "qk_norm")


def latent(model: dict[str, Any], **widths: Any) -> dict[str, Any]:
    """Return the model config with latent attention instead of grouped queries."""
    kept = {key: value for key, value in model.items() if key not in GROUPED}
    return kept | {"latent_attention": WIDTHS | widths, "rope_scaling": YARN}


MODELS = {
    "low": latent(DENSE, q_lora_rank=14),
    "full": latent(DENSE) | {"window": {"tokens": 5, "global_every": 2}, "norms": "both"},
}
DEEPSEEK = latent(MOE, q_lora_rank=14) | {"router": LATENT["router"]}
"""Small DeepSeek-V3 model: a dense layer, groups, a shared expert, router biases."""
EXPERTS = ("ep2", "ep2-tp2-zero3", "ep2-pp2", "ep2-tp2", "hdp4-ep2-zero2", "whole-tp2")


@pytest.mark.parametrize(
    ("model", "layout"),
    thinned(
        {("low", "tp2"), ("full", "pp2"), ("full", "hdp2-tp2-zero2")},
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
        "ep2-tp2-zero3",
        *(pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS if n != "ep2-tp2-zero3"),
    ],
)
def test_gradients_of_deepseeks(run_ranks: RunRanks, layout: str) -> None:
    world_size, settings = EXPERT_LAYOUTS[layout]
    check(run_ranks, world_size, DEEPSEEK, **settings)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    prefix = tmp_path_factory.mktemp("documents") / "store"
    write_store(prefix, [rng.integers(0, tiny.VOCAB, length) for length in documents.LENGTHS])
    return prefix


@pytest.mark.parametrize(
    "layout",
    [
        "hdp2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hdp4-zero3", "hdp2-tp2")),
    ],
)
def test_values_that_are_narrower_than_keys_go_round_a_ring(
    run_ranks: RunRanks, store: Path, layout: str
) -> None:
    world_size, settings = documents.LAYOUTS[layout]
    config = documents.config(str(store), MODELS["low"], **settings)
    assert max(run_ranks(documents.errors, world_size, config)) <= 1e-12


def test_tensor_parallelism_must_divide_the_heads() -> None:
    with pytest.raises(UserError, match=r"parallel\.tp=3 must divide model\.num_heads=4"):
        Layout.of(run(MODELS["low"], "fp64", tp=3), 3)
