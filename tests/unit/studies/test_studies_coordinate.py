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
from numpy.typing import NDArray
from pydantic import TypeAdapter

from allometry.configs.model import (
    DenseModel,
    MaximalUpdateParameterization,
    MoEModel,
    ParameterizationConfig,
    SwiGLUExperts,
)
from allometry.configs.optimization import AdamW, MuonH
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.shapes import Axis, at_width
from allometry.studies.sweeps.coordinate import (
    Bounds,
    CoordinateCheck,
    default_bounds,
    failures,
    slopes,
)
from allometry.studies.sweeps.probe import split

WIDTHS = (32, 64, 128, 256)
SEEDS = (0, 1, 2)
MODEL = DenseModel(vocab_size=128, width=32, num_layers=2, num_heads=2, ffn_width=128, qk_norm=True)
WINDOW = {"tokens": 16, "global_every": 2, "rope_theta": 1000.0}
MUP = {"kind": "mup", "embedding_std": 1.0, "base_width": 32}
SP = {"kind": "sp", "embedding_std": 1.0}
MUP_BOUNDS = default_bounds("mup", Axis.WIDTH)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Products this small are slower on several threads, by a factor of ten on shared cores.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def real_text(batches: int = 1, sequences: int = 4, length: int = 64) -> NDArray[np.int64]:
    """Return source code as bytes, [G, B, L + 1]."""
    text = inspect.getsource(textwrap).encode("ascii")[: batches * sequences * (length + 1)]
    return np.array(list(text), np.int64).reshape(batches, sequences, length + 1)


def measured(
    parameterization: dict[str, Any],
    sizes: tuple[int, ...] = WIDTHS,
    axis: Axis = Axis.WIDTH,
    **changes: Any,
) -> dict[str, float]:
    values: dict[str, Any] = {
        "model": MODEL,
        "parameterization": TypeAdapter(ParameterizationConfig).validate_python(parameterization),
        "optimizer": AdamW(lr=2.0**-6, weight_decay=0.0),
        "tokens_GBL": real_text(),
    }
    movements = CoordinateCheck(**{**values, **changes}).run(sizes, SEEDS, axis)
    assert all(movement.losses[-1] < movement.losses[0] for movement in movements[:3])
    return slopes(movements)


def test_mup_moves_alike_at_every_width() -> None:
    found = measured(MUP)
    assert set(found) == {"blocks.0", "blocks.1", "stream", "logits"}
    assert failures(found, MUP_BOUNDS) == [], found


def test_mup_without_qk_norm_and_zeros_moves_blocks_alike() -> None:
    model = MODEL.model_copy(update={"qk_norm": False})
    found = measured(MUP, model=model, zero_head=False, zero_queries=False)
    assert abs(found["blocks.0"]) <= 0.1, found
    assert abs(found["blocks.1"]) <= 0.1, found


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"norms": "after", "qk_norm_over": "width", "qkv_bias": True},
        {"norms": "both", "activation": "gelu_tanh", "embedding_scale": 2.0, "window": WINDOW},
    ],
    ids=["after", "both"],
)
def test_families_move_alike_at_every_width(options: dict[str, Any]) -> None:
    found = measured(MUP, model=DenseModel.model_validate(MODEL.model_dump() | options))
    assert failures(found, MUP_BOUNDS) == [], found


@pytest.mark.slow
def test_multi_token_prediction_moves_alike_at_every_width() -> None:
    depths = {"multi_token": {"depth": 1, "weight": 0.3}}
    found = measured(MUP, model=DenseModel.model_validate(MODEL.model_dump() | depths))
    assert set(found) == {"blocks.0", "blocks.1", "blocks.2", "stream", "logits"}
    assert failures(found, MUP_BOUNDS) == [], found


def test_the_standard_parameterization_fails_the_same_gate() -> None:
    found = measured(SP)
    assert found["blocks.0"] >= 0.8, found
    assert found["blocks.1"] >= 0.8, found
    assert len(failures(found, MUP_BOUNDS)) == 3, found


def test_gradients_shrink_as_epsilon_does() -> None:
    """Epsilon is divided by m for every role, because every role's gradient is."""
    config = MaximalUpdateParameterization(base_width=32, embedding_std=1.0)
    inputs_BL, targets_BL = split(real_text()[0])
    squares: dict[str, dict[int, list[float]]] = {}
    for width, seed in product(WIDTHS, SEEDS):
        description = at_width(MODEL, width)
        rules = Parameterization(config, description)
        model = build_model(description, rules, "fp32")
        initialize(model, rules, seed)
        model(inputs_BL, targets_BL).total.backward()
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
    assert found["vector"] == pytest.approx(-1.0, abs=0.3), found  # few elements, much noise


# From twice the base on: with 2 layers the stream moves more than in the limit of many layers.
DEPTHS = (4, 8, 16, 32)
DEPTH_BOUNDS = Bounds.within(0.15, 0.2)
DEEP = {"kind": "completep", "embedding_std": 1.0, "base_width": 32, "base_layers": 2}


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_depth_rules_move_the_stream_alike_at_every_depth(alpha: float) -> None:
    found = measured({**DEEP, "depth_alpha": alpha}, DEPTHS, Axis.DEPTH)
    assert failures(found, DEPTH_BOUNDS, Axis.DEPTH) == [], found


def test_mup_alone_fails_over_depth() -> None:
    found = measured(MUP, DEPTHS[:3], Axis.DEPTH)
    assert found["stream"] >= 0.5, found
    assert failures(found, DEPTH_BOUNDS, Axis.DEPTH), found
    assert failures(found, default_bounds("mup", Axis.DEPTH), Axis.DEPTH), found


SMALL = (32, 64, 128)
HYPERP = {"kind": "hyperp", "embedding_std": 0.5, "base_width": 32, "base_layers": 2}
MUONH = MuonH(lr=2.0**-6)


def test_spheres_move_alike_at_every_width() -> None:
    found = measured({**HYPERP, "output_multiplier": "1/m"}, SMALL, optimizer=MUONH)
    assert failures(found, default_bounds("hyperp", Axis.WIDTH)) == [], found


def test_logits_of_the_published_head_grow_with_width() -> None:
    """The head's σ does not depend on the width: the check reports only the logits."""
    found = measured({**HYPERP, "head_std": 0.02}, SMALL, optimizer=MUONH)
    assert found["logits"] >= 0.5, found
    (failure,) = failures(found, default_bounds("hyperp", Axis.WIDTH))
    assert failure.startswith("logits")


def test_spheres_over_depth() -> None:
    found = measured(HYPERP, (2, 4, 8), Axis.DEPTH, optimizer=MUONH)
    assert failures(found, default_bounds("hyperp", Axis.DEPTH), Axis.DEPTH) == [], found


MIXTURE = MoEModel(
    vocab_size=128,
    width=32,
    num_layers=2,
    num_heads=2,
    qk_norm=True,
    experts=SwiGLUExperts(num_experts=4, experts_per_token=2, width=64),
)


def test_a_mixture_under_mup_moves_alike_at_every_width() -> None:
    found = measured(MUP, SMALL, model=MIXTURE)
    assert failures(found, MUP_BOUNDS) == [], found
    control = measured(SP, SMALL, model=MIXTURE)
    assert control["blocks.0"] >= 0.8, control
    assert failures(control, MUP_BOUNDS), control


@pytest.mark.parametrize("kind", ["mup", "hyperp"])
def test_a_mixture_moves_alike_with_any_number_of_experts(kind: str) -> None:
    rules, optimizer = {
        "mup": (MUP, AdamW(lr=2.0**-6, weight_decay=0.0)),
        "hyperp": (HYPERP, MUONH),
    }[kind]
    found = measured(rules, (4, 8, 16), Axis.EXPERTS, model=MIXTURE, optimizer=optimizer)
    assert failures(found, default_bounds(kind, Axis.EXPERTS), Axis.EXPERTS) == [], found


def test_seeds_have_batches_of_their_own() -> None:
    check = CoordinateCheck(
        model=MODEL,
        parameterization=TypeAdapter(ParameterizationConfig).validate_python(MUP),
        optimizer=AdamW(lr=2.0**-6, weight_decay=0.0),
        tokens_GBL=real_text(batches=2),
        steps=1,
    )
    first = check.movement(32, 0)
    assert check.movement(32, 0) == first
    other = CoordinateCheck(
        **{
            name: getattr(check, name)
            for name in ("model", "parameterization", "optimizer", "steps")
        },
        tokens_GBL=real_text(batches=2)[::-1],
    )
    assert other.movement(32, 0) != first
    assert check.movement(32, 2).losses != check.movement(32, 0).losses


def test_failures_name_the_place_the_slope_and_the_bound() -> None:
    bounds = Bounds.within(0.1, 0.2)
    found = {"blocks.0": 0.3, "blocks.1": 0.05, "stream": 0.5, "logits": float("nan")}
    width = failures(found, bounds)
    assert len(width) == 2
    assert width[0] == "blocks.0 moves as width^+0.30, outside -0.1 to +0.1"
    assert "logits" in width[1], "what is not a number is not flat"
    depth = failures({**found, "logits": 0.0}, bounds, Axis.DEPTH)
    assert depth == ["stream moves as depth^+0.50, outside -0.1 to +0.1"]
