"""``parallel: auto`` on ranks: chosen, recorded, kept on resume, planned again for other ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.loader import load, yaml_text
from allometry.configs.machine import load_hardware
from allometry.configs.run import RunConfig
from run_folders import events, rows

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]


def launch(config: RunConfig, stop_at_step: int | None = None) -> None:
    """Run one rank of a run (called on each rank)."""
    import torch

    from allometry.trainer.train import train

    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop_at_step)


def card(path: Path, **changes: Any) -> Path:
    """Write a hardware config in which two processes are two cards."""
    plain = load_hardware("h100").model_dump(mode="json")
    plain["gpu"] |= changes
    path.write_text(yaml_text(plain | {"name": "a test's card"}))
    return path


def choices(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == "layout_chosen"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def test_a_layout_is_chosen_kept_and_planned_again(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    few = ("training.total_steps=8", "checkpoint.every_steps=2")
    auto = f"parallel={{auto: {{cluster: {card(tmp_path / 'card.yaml')}}}}}"
    straight, folder = tmp_path / "straight", tmp_path / "auto"
    run_ranks(launch, 1, tiny(*few, folder=straight))
    config = tiny(*few, auto, folder=folder)
    run_ranks(launch, 2, config, 3)
    run_ranks(launch, 2, config, 5)
    run_ranks(launch, 1, config)
    first, second, third = choices(folder)
    assert first["chosen"] == second["chosen"]
    assert second["reason"] == "as the launch before chose it"
    assert (first["asked"]["world_size"], third["asked"]["world_size"]) == (2, 1)
    assert "planned again, as 2 ranks before, 1 now" in third["reason"]
    assert first["predicted"]["seconds"] > 0
    assert first["degrees_that_fit"] == first["degrees"] > 1
    facts = json.loads((folder / "run.json").read_text())
    assert facts["layout_choice"]["chosen"] == third["chosen"]
    kept = [one["layout_choice"]["asked"]["world_size"] for one in facts["launches"]]
    assert kept == [2, 2, 1]
    layout = facts["launches"][0]["layout"]
    for key in ("tp", "pp", "ep"):
        assert layout[key] == first["chosen"][key]
    assert layout["zero_stage"] == first["chosen"]["zero"]
    settled = load(folder / "config.yaml")
    assert settled.parallel.auto is None
    assert settled.batch.sequences == config.batch.sequences
    assert losses(folder) == pytest.approx(losses(straight), rel=1e-5)
