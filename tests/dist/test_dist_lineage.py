"""Runs on two ranks that start from a one-rank checkpoint: as new runs and as branches."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from gates import Gate
from run_folders import events, rows
from test_dist_runs import launch, losses, stage

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
STABLE = "schedule={kind: constant, warmup_steps: 3}"
SHORT = "training.total_steps=10"


def test_a_new_run_begins_on_another_layout(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    """Keeps weights, states and data; killed twice and with the first run
    deleted: the same bits."""
    first = tmp_path / "first"
    run_ranks(launch, 1, tiny(folder=first), 5)
    initial = f"run.initial={{folder: {first}, keep: [weights, optimizer, data]}}"
    alone, straight = (tiny(initial, SHORT, folder=tmp_path / name) for name in ("one", "two"))
    moved = tiny(initial, SHORT, stage(3), folder=tmp_path / "parts")
    run_ranks(launch, 1, alone)
    run_ranks(launch, 2, straight.model_copy(update={"parallel": moved.parallel}))
    run_ranks(launch, 2, moved, 2)
    shutil.rmtree(first)
    run_ranks(launch, 2, moved, 6)
    run_ranks(launch, 2, moved)
    assert losses(moved) == losses(straight)
    assert losses(moved) == pytest.approx(losses(alone), rel=1e-5)
    origins = [
        json.loads((Path(one.run.folder) / "run.json").read_text())["origin"]
        for one in (alone, moved)
    ]
    assert origins[0] == origins[1]
    last = [rows(Path(one.run.folder))[-1] for one in (alone, moved)]
    for key in ("tokens", "tokens/up", "unique_tokens/up", "epochs/down", "flops"):
        assert last[0][key] == last[1][key]


@pytest.mark.slow
def test_a_branch_with_another_rate_on_another_layout(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    trunk = tmp_path / "trunk"
    run_ranks(launch, 1, tiny(STABLE, "checkpoint.keep_steps=[4]", folder=trunk), 4)
    changed = (
        "optimizer.lr=3e-3",
        "schedule={kind: wsd, warmup_steps: 2, decay_fraction: 0.5}",
        "data.sources.1.weight=0.9",
        f"run.parent={{folder: {trunk}, step: 4, changes: [optimizer.lr, schedule, data]}}",
        SHORT,
    )
    pipelined = (*changed, "parallel.pp=2")
    alone = tiny(*changed, folder=tmp_path / "one")
    straight, parts = (tiny(*pipelined, folder=tmp_path / name) for name in ("two", "parts"))
    run_ranks(launch, 1, alone)
    run_ranks(launch, 2, straight)
    run_ranks(launch, 2, parts, 6)
    shutil.rmtree(trunk)
    run_ranks(launch, 2, parts, 8)
    run_ranks(launch, 2, parts)
    assert losses(parts) == losses(straight)
    assert losses(parts) == pytest.approx(losses(alone), rel=1e-5)
    rates = [[row["lr"] for row in rows(Path(one.run.folder))] for one in (parts, alone)]
    assert rates[0] == rates[1]
    assert rates[0][4:6] == [1.5e-3, 3e-3]
    told = [event for event in events(tmp_path / "parts") if event["event"] == "config_changed"]
    assert len(told) == len({event["key"] for event in told}) > 3


def test_what_is_refused_is_refused_by_all_ranks(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    run_ranks(launch, 1, tiny(folder=first), 5)
    shard = next((first / "checkpoints/step-5").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    new = tiny(f"run.initial={{folder: {first}}}", SHORT, folder=tmp_path / "new")
    said = run_ranks(refused, 2, new)
    assert said[0] == said[1]
    assert "cannot be begun with (__0_0.distcp has changed" in said[0]
    assert not (tmp_path / "new").exists()


def refused(config: RunConfig) -> str:
    """Return the refusal sentence of a run on one of the ranks."""
    from allometry.configs.errors import UserError

    try:
        launch(config)
    except UserError as error:
        return str(error)
    return ""


def killed_at(gate: Gate, config: Path) -> None:
    """Train like a user, and kill the process at the gate."""
    process = subprocess.Popen(
        [sys.executable, "-m", "allometry.launch.train", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | gate.environment | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        gate.wait(process)
        process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    "section",
    [
        "run.initial={folder: FIRST, keep: [weights, optimizer, data]}",
        "run.parent={folder: FIRST, step: 5, changes: [optimizer.lr, schedule]}",
    ],
)
def test_two_kills_leave_the_bits_as_they_are(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, section: str
) -> None:
    first = tmp_path / "first"
    run_ranks(launch, 1, tiny(STABLE, "checkpoint.keep_steps=[5]", folder=first), 5)
    changed = (
        section.replace("FIRST", str(first)),
        "optimizer.lr=4e-3",
        "schedule={kind: cosine, warmup_steps: 2}",
        "checkpoint.every_steps=2",
        "training.total_steps=12",
    )
    straight, killed = (tiny(*changed, folder=tmp_path / name) for name in ("straight", "killed"))
    run_ranks(launch, 1, straight)
    path = tmp_path / "killed.yaml"
    path.write_text(dump(killed))
    killed_at(Gate(tmp_path / "once", 7), path)
    shutil.rmtree(first)
    killed_at(Gate(tmp_path / "twice", 10), path)
    run_ranks(launch, 1, killed)
    assert losses(killed) == losses(straight)
    assert [event["event"] for event in events(tmp_path / "killed")].count("resumed") == 2
    keys = ("s1", "s2", "lr", "tokens", "grad_norm")
    found, wanted = (
        [[row[key] for key in keys] for row in rows(tmp_path / name)]
        for name in ("killed", "straight")
    )
    assert found == wanted
