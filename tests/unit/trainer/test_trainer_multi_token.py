"""Runs with multi-token prediction: their rows, and bit-exact resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import rows

Make = Callable[..., RunConfig]
DEPTHS = "model.multi_token={depth: 2, weight: 0.3}"
EXPERTS = {
    "kind": "moe",
    "vocab_size": 64,
    **{"width": 32, "num_layers": 2, "num_heads": 4, "ffn_width": 64, "first_dense_layers": 1},
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 24},
    "router": {"gate": "sigmoid", "balance": {"kind": "bias", "centered": True}},
    "multi_token": {"depth": 1, "weight": 0.3},
}


def test_rows_have_each_depth_and_the_drafts(tiny: Make, tmp_path: Path) -> None:
    monitors = "record.monitors={every_steps: 4}"
    train(tiny(DEPTHS, monitors, "training.total_steps=10", folder=tmp_path / "with"), callbacks=[])
    train(tiny(monitors, "training.total_steps=4", folder=tmp_path / "without"), callbacks=[])
    found, other = rows(tmp_path / "with"), rows(tmp_path / "without")
    first, last = found[0], found[-1]
    assert first["loss"] == other[0]["loss"], "the main loss alone"
    assert {"multi_token/1", "multi_token/2"} <= first.keys()
    assert first["flops"] > other[0]["flops"]
    assert last["multi_token/1"] < first["multi_token/1"]
    assert last["multi_token/2"] < first["multi_token/2"]
    assert 0.0 <= last["drafts_accepted"] <= 1.0
    assert "drafts_accepted" not in first
    assert not {key for row in other for key in row if "multi_token" in key or "drafts" in key}
    own = {"multi_token/1", "multi_token/2"}
    assert {key for key in found[3] if key.startswith("monitors/")} <= other[3].keys()
    assert set(found[3]) - set(other[3]) == own


@pytest.mark.parametrize(
    "extra",
    [
        [DEPTHS, "training.compute_dtype=bf16"],
        pytest.param([f"model={json.dumps(EXPERTS)}"], marks=pytest.mark.slow),
    ],
    ids=["dense", "experts"],
)
def test_two_resumes_are_bit_exact(tiny: Make, tmp_path: Path, extra: list[str]) -> None:
    short = ("training.total_steps=6", "checkpoint.every_steps=6")
    train(tiny(*extra, *short, folder=tmp_path / "straight"), callbacks=[])
    parts = tiny(*extra, *short, folder=tmp_path / "parts")
    train(parts, callbacks=[], stop_at_step=2)
    train(parts, callbacks=[], stop_at_step=4)
    train(parts, callbacks=[])
    keys = ("loss", "grad_norm", "multi_token/1", "drafts_accepted", "validation/up")
    for one, two in zip(rows(tmp_path / "straight"), rows(tmp_path / "parts"), strict=True):
        assert [one.get(key) for key in keys] == [two.get(key) for key in keys], one["step"]
