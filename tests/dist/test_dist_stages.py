"""Runs in stages on several ranks: boundaries, resumes and other layouts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import events, rows

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
STAGES = [
    {"name": "stable", "steps": 3},
    {
        "name": "long",
        "steps": 3,
        "data": {"sequence_length": 64},
        "batch": {"sequences": 4, "micro_batch_sequences": 1},
        "mixture": {"up": 1, "down": 3},
        "schedule": {"kind": "linear"},
    },
]
GIVEN = (
    "training.total_steps=null",
    "schedule={kind: constant}",
    f"stages={json.dumps(STAGES)}",
)


def launch(config: RunConfig, stop_at_step: int | None = None) -> None:
    """Run one rank of a run (called on each rank)."""
    import torch

    from allometry.trainer.train import train

    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop_at_step)


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in rows(Path(config.run.folder))]


SHARDED = pytest.param("parallel.zero.stage=3", marks=pytest.mark.slow)


@pytest.mark.parametrize("layout", [SHARDED, "parallel.tp=2"])
def test_a_boundary_on_two_ranks(tiny: Make, run_ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """Resume at the boundary bitwise, and continue from two ranks on one."""
    straight = tiny(*GIVEN, layout, folder=tmp_path / "straight")
    parts = tiny(*GIVEN, layout, folder=tmp_path / "parts")
    moved = tiny(*GIVEN, folder=tmp_path / "moved")
    run_ranks(launch, 2, straight)
    run_ranks(launch, 2, parts, 3)
    run_ranks(launch, 2, parts)
    assert losses(parts) == losses(straight)
    assert len(losses(parts)) == 6
    run_ranks(launch, 2, tiny(*GIVEN, layout, folder=tmp_path / "moved"), 2)
    run_ranks(launch, 1, moved)
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-5)
    for config in (straight, moved):
        folder = Path(config.run.folder)
        said = [event["name"] for event in events(folder) if event["event"] == "stage"]
        assert said == ["stable", "long"]
        assert rows(folder)[-1]["tokens/down"] == rows(Path(straight.run.folder))[-1]["tokens/down"]
