"""Runs in stages: the bits of a single run, resumes at any step, rates, samples and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
TIMES = {"time_s", "tokens_per_s", "mfu", "peak_bytes", "stage"}
STAGED = ("training.total_steps=null", "schedule={kind: constant}", "evaluation.every_steps=4")
LONG = {"data": {"sequence_length": 64}, "batch": {"sequences": 4, "micro_batch_sequences": 1}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stages(*given: dict[str, Any]) -> str:
    named = [{"name": f"s{number}"} | one for number, one in enumerate(given)]
    return f"stages={json.dumps(named)}"


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=CPU, callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def saved(folder: Path, step: int) -> dict[str, bytes]:
    path = folder / "checkpoints" / f"step-{step}"
    return {file.name: file.read_bytes() for file in path.glob("*.distcp")}


THREE = stages(
    {"steps": 6},
    {"steps": 5, **LONG, "mixture": {"up": 1, "down": 1}, "model": {"rope_theta": 5e4}},
    {"steps": 5, "optimizer": {"lr": 3e-3}, "schedule": {"kind": "linear", "warmup_steps": 2}},
)


def test_stages_of_the_same_settings_are_one_run(tiny: Make, tmp_path: Path) -> None:
    """To the bit, checkpoint and record, but for the stage's number."""
    plain = run(tiny("schedule={kind: constant}", "training.total_steps=12", folder=tmp_path / "p"))
    two = run(tiny(STAGED[0], STAGED[1], stages({"steps": 5}, {"steps": 7}), folder=tmp_path / "t"))
    without = [{k: v for k, v in row.items() if "/" not in k} for row in numbers(two)]
    assert without == [{k: v for k, v in row.items() if "/" not in k} for row in numbers(plain)]
    assert saved(two, 12) == saved(plain, 12)
    assert [row["stage"] for row in rows(two)] == [1] * 5 + [2] * 7
    assert "stage" not in rows(plain)[0]


def test_stages_are_the_schedule_that_was_continued_by_hand(tiny: Make, tmp_path: Path) -> None:
    """``schedule.kind: continued`` says the same of one run: a warm-up from the last rate."""
    before = {"kind": "wsd", "warmup_steps": 2, "decay_fraction": 0.5, "final_fraction": 0.1}
    after = {"kind": "cosine", "warmup_steps": 3}
    schedule = {"kind": "continued", "before": before, "before_steps": 7, "after": after}
    by_hand = tiny(
        f"schedule={json.dumps(schedule)}", "training.total_steps=14", folder=tmp_path / "hand"
    )
    staged = tiny(
        STAGED[0],
        stages({"steps": 7, "schedule": before}, {"steps": 7, "schedule": after}),
        folder=tmp_path / "staged",
    )
    hand, made = run(by_hand), run(staged)
    assert [row["lr"] for row in rows(hand)] == [row["lr"] for row in rows(made)]
    assert [row["loss"] for row in rows(hand)] == [row["loss"] for row in rows(made)]
    assert saved(hand, 14) == saved(made, 14)


@pytest.mark.parametrize("stops", [(5, 10), (6, 11), (7, 13), (6, 6, 12)])
def test_a_resume_before_at_and_after_boundaries_is_exact(
    tiny: Make, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole = tmp_path / "whole"
    run(tiny(*STAGED, THREE, folder=whole))
    cut = tmp_path / "cut"
    for stop in dict.fromkeys(stops):
        run(tiny(*STAGED, THREE, folder=cut), stop=stop)
        assert rows(cut)[-1]["step"] == stop
    run(tiny(*STAGED, THREE, folder=cut))
    assert numbers(cut) == numbers(whole)
    assert saved(cut, 16) == saved(whole, 16)


def test_what_a_boundary_says(tiny: Make) -> None:
    folder = run(tiny(*STAGED, THREE))
    said = [event for event in events(folder) if event["event"] == "stage"]
    assert [(one["name"], one["step"], one["last_step"]) for one in said] == [
        ("s0", 0, 6),
        ("s1", 6, 11),
        ("s2", 11, 16),
    ]
    assert said[1]["tokens_before"] == 6 * 256
    assert said[1]["changes"]["data.sequence_length"] == [32, 64]
    assert said[1]["changes"]["model.rope_theta"] == [1e4, 5e4]
    assert said[2]["changes"]["optimizer.lr"] == [1e-2, 3e-3]
    kinds = [event["event"] for event in events(folder)]
    assert kinds.count("finished") == kinds.count("started") == 1
    assert "mixture_changed" not in kinds
    last = rows(folder)[-1]
    assert last["tokens"] == last["tokens/up"] + last["tokens/down"] == 16 * 256
    record = json.loads((folder / "run.json").read_text())
    assert record["plan"]["total_steps"] == 16
    assert record["plan"]["total_tokens"] == 16 * 256
    assert [launch["first_step"] for launch in record["launches"]] == [1, 7, 12]
    validated = [row["step"] for row in rows(folder) if "validation/up" in row]
    assert validated == [4, 6, 8, 11, 12, 16]
