"""Runs with each parameterization, away from its base: they learn, and record their scaling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.train import train
from run_folders import rows

Make = Callable[..., RunConfig]
WIDTHS = ["parameterization.base_width=16", "parameterization.embedding_std=0.5"]
MOE = [
    "model.kind=moe",
    "model.ffn_width=null",
    "model.experts={kind: swiglu, num_experts: 8, experts_per_token: 4, width: 32}",
    "model.router={gate: sigmoid, balance: {kind: none}}",
]
MSSP = [
    *MOE,
    "parameterization.kind=mssp",
    *WIDTHS,
    "parameterization.base_experts_per_token=2",
    "parameterization.base_expert_width=16",
    "optimizer.lr=0.02",
]
RUNS: dict[str, list[str]] = {
    "mup": ["parameterization.kind=mup", *WIDTHS],
    "completep": ["parameterization.kind=completep", *WIDTHS, "parameterization.base_layers=1"],
    "mupp": [
        "parameterization.kind=mupp",
        *WIDTHS,
        "parameterization.base_layers=1",
        "parameterization.base_batch_tokens=128",
        "parameterization.batch_rule=sde",
    ],
    "hyperp": [
        "parameterization.kind=hyperp",
        *WIDTHS,
        "parameterization.base_layers=1",
        "parameterization.base_batch_tokens=128",
        "parameterization.base_tokens=1024",
        "optimizer.kind=muonh",
        "optimizer.lr=0.06",
    ],
    "mssp-I": [
        *MSSP,
        "parameterization.regime=I",
        "parameterization.base_experts=8",
        "parameterization.base_experts_per_token=4",
    ],
    "mssp-II": [
        *MSSP,
        "parameterization.regime=II",
        "parameterization.base_experts=4",
        "parameterization.base_expert_width=32",
    ],
    "mssp-III": [*MSSP, "parameterization.regime=III", "parameterization.base_experts=4"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_and_records_its_rules(tiny: Make, name: str) -> None:
    config = tiny(*RUNS[name])
    train(config, device=torch.device("cpu"), callbacks=[])
    folder = Path(config.run.folder)
    found = rows(folder)
    assert all(math.isfinite(row["loss"]) for row in found)
    assert found[-1]["loss"] < 0.85 * found[0]["loss"], "it learns to count"
    recorded = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    said = next(v for k, v in _nested(recorded) if k == "parameterization")
    expected = Parameterization.of_run(config).describe()
    assert said == json.loads(json.dumps(expected))
    assert said["scale"] == {"batch_tokens": 8 * 32, "total_tokens": 20 * 8 * 32}
    if name == "hyperp":
        q = 2**0.5 * 2**-0.5 * 5**-0.32
        assert said["roles"]["hidden"]["lr"] == pytest.approx(q, rel=1e-12)


def _nested(value: object) -> Iterator[tuple[str, dict[str, object]]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield key, inner
                yield from _nested(inner)
