"""Multi-token prediction in layouts: the gradients of one process in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from test_dist_families import PLACES, check
from test_dist_layouts import DENSE, EXPERT_LAYOUTS, MOE
from thinned import thinned

RunRanks = Callable[..., list[Any]]
DEPTHS = {"multi_token": {"depth": 2, "weight": 0.3}}
MODELS = {"plain": DENSE | DEPTHS, "tied": DENSE | DEPTHS | {"tied_embeddings": True}}


@pytest.mark.parametrize(
    ("model", "layout"),
    thinned({("tied", "pp2-tp2"), ("plain", "hdp2-zero3")}, tuple(MODELS), tuple(PLACES)),
)
def test_gradients_of_dense_models(run_ranks: RunRanks, model: str, layout: str) -> None:
    world_size, settings = PLACES[layout]
    check(run_ranks, world_size, MODELS[model], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_gradients_with_experts(run_ranks: RunRanks, layout: str) -> None:
    world_size, settings = EXPERT_LAYOUTS[layout]
    check(run_ranks, world_size, MOE | DEPTHS, **settings)
