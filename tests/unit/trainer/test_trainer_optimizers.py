"""Runs with each kind of optimizer learn, and resume bitwise."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.scaling.update_rules import OPTIMIZER_KINDS
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
KINDS: dict[str, list[str]] = {
    "lion": ["optimizer.lr=0.003"],
    "muon": ["optimizer.lr=0.01"],
    "muonh": ["optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "adamh": ["optimizer.lr=0.03", "optimizer.adamw_lr=0.01"],
    "sgd_sai": ["optimizer.lr=0.03"],
    "apollo": ["optimizer.lr=0.01", "optimizer.refresh_steps=4"],
    "apollo_mini": ["optimizer.lr=0.01", "optimizer.refresh_steps=4"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, callbacks=[], **options)
    return Path(config.run.folder)


def test_every_kind_is_run() -> None:
    assert {*KINDS, "adamw"} == set(OPTIMIZER_KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_two_resumes_are_bit_exact(tiny: Make, tmp_path: Path, kind: str) -> None:
    said = [f"optimizer.kind={kind}", *KINDS[kind]]
    straight = run(tiny(*said, folder=tmp_path / "straight"))
    parts = tiny(*said, folder=tmp_path / "parts")
    run(parts, stop_at_step=7)
    run(parts, stop_at_step=12)
    folder = run(parts)
    found = rows(straight)
    for one, other in zip(found, rows(folder), strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert one[key] == other[key], (key, one["step"])
    assert [event["step"] for event in events(folder) if event["event"] == "resumed"] == [7, 12]
    assert all(math.isfinite(row["loss"]) for row in found)
    assert found[-1]["loss"] < 0.8 * found[0]["loss"], "it learns to count"


def test_negative_control_kinds_differ(tiny: Make, tmp_path: Path) -> None:
    found = [
        [row["loss"] for row in rows(run(tiny(*said, folder=tmp_path / f"{number}")))]
        for number, said in enumerate(
            (["training.total_steps=4"], ["training.total_steps=4", "optimizer.kind=muon"])
        )
    ]
    assert found[0][0] == found[1][0]
    assert found[0][1:] != found[1][1:]
