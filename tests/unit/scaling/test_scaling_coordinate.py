"""The coordinate check of muP, with the standard parameterization as its negative control."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.model import (
    DenseModel,
    MaximalUpdateParameterization,
    ParameterizationConfig,
)
from allometry.configs.optimization import AdamW
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.coordinate import CoordinateCheck, at_width, failures, slopes

WIDTHS = (32, 64, 128, 256)
SEEDS = (0, 1, 2)
MODEL = DenseModel(vocab_size=128, width=32, num_layers=2, num_heads=2, ffn_width=128, qk_norm=True)
MUP = {"kind": "mup", "embedding_std": 1.0, "base_width": 32}
SP = {"kind": "sp", "embedding_std": 1.0}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Products this small are slower on several threads, ten times so where cores are shared.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real_text(sequences: int = 4, length: int = 64) -> Tensor:
    text = inspect.getsource(textwrap).encode("ascii")[: sequences * (length + 1)]
    return torch.tensor(list(text)).view(sequences, length + 1)


def measured(parameterization: dict[str, Any], **changes: Any) -> dict[str, float]:
    values: dict[str, Any] = {
        "model": MODEL,
        "parameterization": TypeAdapter(ParameterizationConfig).validate_python(parameterization),
        "optimizer": AdamW(lr=2.0**-6, weight_decay=0.0),
        "tokens_BL": real_text(),
    }
    movements = CoordinateCheck(**{**values, **changes}).run(WIDTHS, SEEDS)
    assert all(movement.losses[-1] < movement.losses[0] for movement in movements[:3])
    return slopes(movements)


def test_mup_moves_alike_at_every_width() -> None:
    found = measured(MUP)
    assert set(found) == {"blocks.0", "blocks.1", "logits"}
    assert failures(found) == [], found


def test_mup_without_qk_norm_and_zeros_moves_blocks_alike() -> None:
    model = MODEL.model_copy(update={"qk_norm": False})
    found = measured(MUP, model=model, zero_head=False, zero_queries=False)
    assert abs(found["blocks.0"]) <= 0.1, found
    assert abs(found["blocks.1"]) <= 0.1, found


def test_the_standard_parameterization_fails_the_same_gate() -> None:
    found = measured(SP)
    assert found["blocks.0"] >= 0.8, found
    assert found["blocks.1"] >= 0.8, found
    assert len(failures(found)) == 3, found


def test_gradients_shrink_as_epsilon_does() -> None:
    """Epsilon is divided by m for every role because every role's gradient is."""
    config = MaximalUpdateParameterization(base_width=32, embedding_std=1.0)
    tokens = real_text()
    squares: dict[str, dict[int, list[float]]] = {}
    for width, seed in product(WIDTHS, SEEDS):
        description = at_width(MODEL, width)
        rules = Parameterization(config, description)
        model = build_model(description, rules, "fp32")
        initialize(model, rules, seed)
        model(tokens[:, :-1], tokens[:, 1:].contiguous()).total.backward()
        specs = parameter_specs(model)
        for name, parameter in model.named_parameters():
            if name.endswith((".q_norm.weight", ".k_norm.weight")):
                continue  # shared by all heads: its gradient also adds up over them
            assert rules.resolve(specs[name]).eps == 32 / width
            assert parameter.grad is not None
            by_width = squares.setdefault(specs[name].role.value, {})
            by_width.setdefault(width, []).append(float(parameter.grad.square().mean()))
    found = {
        role: float(
            np.polyfit(np.log2(WIDTHS), [np.log2(np.mean(by_width[w])) / 2 for w in WIDTHS], 1)[0]
        )
        for role, by_width in squares.items()
    }
    for role in ("input", "hidden", "output"):
        assert found[role] == pytest.approx(-1.0, abs=0.1), found
    assert found["vector"] == pytest.approx(-1.0, abs=0.3), found  # few numbers, much noise


def test_a_width_that_cannot_be_made_is_named() -> None:
    wider = at_width(MODEL, 48)
    assert (wider.num_heads, wider.kv_heads, wider.ffn_width, wider.head_width) == (3, 3, 192, 16)
    with pytest.raises(UserError, match=r"model.num_heads=2 cannot be scaled from width=32 to"):
        at_width(MODEL, 40)
