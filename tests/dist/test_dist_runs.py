"""Runs on several ranks: resumes in the same layout and in others, and golden losses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from run_folders import events, rows
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_fp32.json"


def launch(config: RunConfig, stop_at_step: int | None = None) -> None:
    """Run one rank of a run (called on each rank)."""
    import torch

    from allometry.trainer.train import train

    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop_at_step)


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in rows(Path(config.run.folder))]


def stage(number: int) -> str:
    return f"parallel.zero.stage={number}"


@pytest.mark.parametrize("number", thinned({0, 3}, [0, 1, 2, 3]))
def test_two_resumes_are_bit_exact_on_two_ranks(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, number: int
) -> None:
    straight = tiny(stage(number), folder=tmp_path / "straight")
    parts = tiny(stage(number), folder=tmp_path / "parts")
    run_ranks(launch, 2, straight)
    run_ranks(launch, 2, parts, 7)
    run_ranks(launch, 2, parts, 12)
    run_ranks(launch, 2, parts)
    assert losses(parts) == losses(straight)
    assert len(losses(parts)) == 20


def test_a_run_moves_between_layouts(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    straight = tiny(folder=tmp_path / "straight")
    run_ranks(launch, 1, straight)
    moving = tmp_path / "moving"
    run_ranks(launch, 2, tiny(stage(3), folder=moving), 5)
    run_ranks(launch, 4, tiny(stage(2), folder=moving), 9)
    run_ranks(launch, 1, tiny(stage(0), folder=moving), 13)
    run_ranks(launch, 4, tiny(stage(0), "batch.micro_batch_sequences=1", folder=moving), 16)
    run_ranks(launch, 2, tiny(stage(1), folder=moving))
    moved = losses(tiny(folder=moving))
    assert moved == pytest.approx(losses(straight), rel=1e-5)
    flops = [[row["flops"] for row in rows(folder)] for folder in (moving, tmp_path / "straight")]
    assert flops[0] == flops[1]  # for the documents of all ranks
    assert moved[:5] != pytest.approx(losses(straight)[1:6], rel=1e-5), "the comparison can fail"


def test_a_mixture_changes_while_a_run_moves_between_layouts(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    """The same samples as before: edited on two ranks, declared on one."""
    few = ("training.total_steps=8", "checkpoint.every_steps=2", "evaluation.every_steps=4")
    old = "data.replay={ratio: 0.25, sources: [down]}"
    new = "data.replay={ratio: 0.9, sources: [down]}"
    change = "changes: [{after_tokens: 1024, ratio: 0.9}]"
    declared = f"data.replay={{ratio: 0.25, sources: [down], {change}}}"
    straight, moving = tmp_path / "straight", tmp_path / "moving"
    run_ranks(launch, 1, tiny(*few, declared, folder=straight))
    run_ranks(launch, 2, tiny(*few, old, stage(3), folder=moving), 4)
    run_ranks(launch, 2, tiny(*few, new, "parallel.pp=2", folder=moving), 6)
    run_ranks(launch, 1, tiny(*few, new, folder=moving))
    exact = ("tokens/up", "tokens/down", "unique_tokens/down", "epochs/down")
    near = ("loss", "loss/up", "loss/down", "forgetting/down")
    for one, other in zip(rows(straight), rows(moving), strict=True):
        assert [one[key] for key in exact] == [other[key] for key in exact]
        assert [key in one for key in near] == [key in other for key in near]
        there = [key for key in near if key in one]
        assert [one[key] for key in there] == pytest.approx([other[key] for key in there], abs=2e-5)
    assert {row["step"] for row in rows(moving) if "forgetting/down" in row} == {4, 8}
    kinds = [event["event"] for event in events(moving)]
    assert (kinds.count("mixture_changed"), kinds.count("held_out_before")) == (1, 1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_golden_losses(
    tiny: Make,
    run_ranks: Ranks,
    tmp_path: Path,
    world_size: int,
    pytestconfig: pytest.Config,
) -> None:
    """Compare each step's loss with the stored one.

    `pytest tests/dist/test_dist_runs.py -k golden --update-golden` updates the stored losses.
    """
    config = tiny("training.total_steps=60", folder=tmp_path / "golden")
    run_ranks(launch, world_size, config)
    recorded = losses(config)
    if pytestconfig.getoption("--update-golden") and world_size == 1:
        GOLDEN.write_text(json.dumps({"loss": recorded}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())["loss"]
    assert recorded == pytest.approx(golden, rel=1e-4)
    assert golden[-1] < 0.5 * golden[0]


def test_every_rank_learns_of_one_ranks_error(tiny: Make, run_ranks: Ranks) -> None:
    said = run_ranks(failing_launch, 2, tiny("data.sources.0.train=nowhere"))
    assert said[0] == said[1]
    assert "nowhere" in said[0]


def failing_launch(config: RunConfig) -> str:
    from allometry.configs.errors import UserError

    try:
        launch(config)
    except UserError as error:
        return str(error)
    raise AssertionError("it should have failed")


def test_a_batch_the_ranks_cannot_divide(tiny: Make, run_ranks: Ranks) -> None:
    said = run_ranks(failing_launch, 3, tiny("data.sources.0.train=nowhere"))
    assert "batch.sequences=8 cannot be divided by hdp=3" in said[0]
    assert "use batch.sequences=6 or 12" in said[0]
