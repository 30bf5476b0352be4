"""Coordinate check of muP's derived learning rates for rules other than Adam's."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import OptimizerConfig
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim.build import build_optimizer
from allometry.scaling.parameterization import Parameterization
from allometry.studies.sweeps.coordinate import CoordinateCheck, slopes

WIDTHS, SEEDS = (32, 64, 128), (0, 1)
MODEL = DenseModel(vocab_size=128, width=32, num_layers=2, num_heads=2, ffn_width=128, qk_norm=True)
MUP = {"kind": "mup", "base_width": 32, "embedding_std": 1.0}
SP = {"kind": "sp", "embedding_std": 1.0}
MUON = {"kind": "muon", "lr": 0.05, "adamw_lr": 2.0**-6, "weight_decay": 0.0}
SAI = {"kind": "sgd_sai", "lr": 1e-3, "weight_decay": 0.0}


@cache
def tokens() -> torch.Tensor:
    """Return two batches of a Markov chain over 128 symbols with few successors
    each, as in text."""
    draw = random.Random(1)
    common = [1.0 / (1 + rank) for rank in range(MODEL.vocab_size)]
    followers = [draw.choices(range(MODEL.vocab_size), common, k=6) for _ in common]
    chain = [0]
    while len(chain) < 2 * 4 * 65:
        chain.append(draw.choice(followers[chain[-1]]))
    return torch.tensor(chain).view(2, 4, 65)


def measured(parameterization: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, float]:
    check = CoordinateCheck(
        model=MODEL,
        parameterization=TypeAdapter(ParameterizationConfig).validate_python(parameterization),
        optimizer=TypeAdapter(OptimizerConfig).validate_python(optimizer),
        tokens_GBL=tokens(),
    )
    movements = check.run(WIDTHS, SEEDS)
    assert all(movement.losses[-1] < movement.losses[0] for movement in movements)
    return slopes(movements)


@pytest.mark.parametrize(
    "optimizer",
    [
        {**MUON, "adjust": "none"},
        {**MUON, "adjust": "original"},
        {**MUON, "adjust": "match_rms_adamw"},
        SAI,
        {"kind": "lion", "lr": 2.0**-7, "weight_decay": 0.0},
        {"kind": "apollo", "lr": 2.0**-6},
        {"kind": "apollo_mini", "lr": 2.0**-6},
    ],
    ids=lambda optimizer: "-".join(str(optimizer.get(key, "")) for key in ("kind", "adjust")),
)
def test_updates_move_activations_alike_at_every_width(optimizer: dict[str, Any]) -> None:
    found = measured(MUP, optimizer)
    assert abs(found["blocks.0"]) <= 0.12, found
    assert abs(found["blocks.1"]) <= 0.12, found
    assert abs(found["logits"]) <= 0.2, found


def test_without_the_rules_they_do_not() -> None:
    muon = measured(SP, {**MUON, "adjust": "match_rms_adamw"})
    assert min(muon["blocks.0"], muon["blocks.1"], muon["logits"]) > 0.2, muon
    sai = measured(SP, SAI)
    assert sai["logits"] >= 0.8, sai


@pytest.mark.parametrize("kind", ["apollo", "apollo_mini"])
def test_matrices_behind_a_head_of_zeros_move(kind: str) -> None:
    """Their first gradient is zero, and a limit on growth from zero would freeze them."""
    config = TypeAdapter(OptimizerConfig).validate_python({"kind": kind, "lr": 0.01})
    mup = TypeAdapter(ParameterizationConfig).validate_python({**MUP, "zero_head": True})
    rules = Parameterization(mup, MODEL, config)
    model = build_model(MODEL, rules, "fp32")
    initialize(model, rules, seed=0)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    updates = build_optimizer(model.named_parameters(), parameter_specs(model), rules, config)
    batch_BL = tokens()[0]
    for _ in range(3):
        updates.zero_grad()
        model(batch_BL[:, :-1], batch_BL[:, 1:].contiguous()).total.div(256).backward()
        updates.step()
    for name, parameter in model.named_parameters():
        assert float((parameter - start[name]).detach().abs().max()) > 1e-4, name
