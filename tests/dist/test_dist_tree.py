"""A tree of runs as a user trains it: complete, interrupted, extended, wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from gates import LIMIT_S, Gate
from run_folders import events, rows
from shell import Shell

Write = Callable[..., Path]
KEYS = ("step", "tokens", "flops", "loss", "grad_norm", "lr", "s1", "s2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
DECAY = {"schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3}}
BRANCHES = (
    {"name": "short", "at": 7, "set": DECAY | {"training.total_steps": 10}},
    {"name": "long", "at": 14, "set": DECAY},
)


@pytest.fixture
def tree(tiny: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Write]:
    """Yield ``tree(key=value)``, which writes a small tree of the tiny run; its file."""
    tiny("checkpoint.every_steps=null")

    def write(**keys: Any) -> Path:
        described = {
            "kind": "tree",
            "folder": str(tmp_path / "tree"),
            "trunk": {
                "base": "tiny.yaml",
                "set": {"schedule": {"kind": "constant", "warmup_steps": 3}},
            },
            "branches": BRANCHES,
        }
        path = tmp_path / "tree.yaml"
        path.write_text(json.dumps(described | keys))
        return path

    return write


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "allometry.launch.cli", *map(str, arguments)]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def comparable(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(key) for key in KEYS) for row in rows(folder)]


def kinds(folder: Path) -> list[str]:
    wanted = ("started", "branched", "resumed", "stopped", "finished")
    return [event["event"] for event in events(folder) if event["event"] in wanted]


def test_tree_from_nothing(shell: Shell, tree: Write, tmp_path: Path) -> None:
    runs = tmp_path / "tree/runs"
    said = shell("branch", "--tree", tree())
    assert "[3/3]" in said
    assert [kinds(runs / name)[0] for name in ("trunk", "short", "long")] == [
        "started",
        "branched",
        "branched",
    ]
    assert comparable(runs / "short")[:7] == comparable(runs / "trunk")[:7]
    assert comparable(runs / "short")[7:] != comparable(runs / "trunk")[7:10]
    assert "3 of 3 runs are done" in shell("branch", "--tree", tmp_path / "tree")


@pytest.mark.slow
def test_tree_interrupted_grown_and_wrong(shell: Shell, tree: Write, tmp_path: Path) -> None:
    """A stopped trunk continues to all branches; a later branch needs the kept step."""
    runs = tmp_path / "tree/runs"
    gate = Gate(tmp_path / "gate", 9)
    process = subprocess.Popen(
        command("branch", "--tree", tree()),
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | gate.environment,
    )
    gate.wait(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT; the same command goes on from here" in output
    listed = shell.json("runs", tmp_path)["runs"]
    assert {one["run"]: one["state"] for one in listed} == {
        "tree/runs/long": "new",
        "tree/runs/short": "new",
        "tree/runs/trunk": "stopped",
    }
    assert {one["parent"] for one in listed} == {None, "tree/runs/trunk"}

    assert "[3/3]" in shell("branch", "--tree", tree())
    assert kinds(runs / "trunk") == ["started", "stopped", "resumed", "finished"]
    assert kinds(runs / "long") == ["branched", "finished"]
    assert comparable(runs / "long")[:14] == comparable(runs / "trunk")[:14]
    assert comparable(runs / "long")[14:] != comparable(runs / "trunk")[14:]
    facts = shell.json("branch", "--tree", tmp_path / "tree", "--dry-run")
    assert [run["state"] for run in facts["runs"]] == ["done"] * 3
    before = {path: path.read_bytes() for path in runs.glob("*/metrics.jsonl")}

    # Branch from a kept step of the trunk and of a branch; then from a step that was not kept.
    twig = {"name": "twig", "parent": "long", "at": 20, "set": {"training.total_steps": 40}}
    grown = tree(branches=[*BRANCHES, twig])
    text = shell.refusal("branch", "--tree", grown)
    assert "branch twig of the tree: schedule or training" in text, "the decay has begun"
    late = {"name": "late", "at": 11, "set": DECAY | {"training.total_steps": 15}}
    text = shell.refusal("branch", "--tree", tree(branches=[*BRANCHES, late]))
    assert "late branches from step 11 of trunk" in text
    assert "has not kept it" in text
    again = {
        "name": "again",
        "at": 14,
        "set": {"schedule": DECAY["schedule"] | {"decay": "linear"}},
    }
    assert "[4/4]" in shell("branch", "--tree", tree(branches=[*BRANCHES, again]))
    assert {path: path.read_bytes() for path in before} == before

    # Changes to an existing run are refused; the folder's description is unchanged.
    text = shell.refusal(
        "branch", "--tree", tree(trunk={"base": "tiny.yaml", "set": {"optimizer.lr": 1}})
    )
    assert "was trained with optimizer.lr=0.01, and the tree now says 1.0" in text
    facts = shell.json("branch", "--tree", tmp_path / "tree", "--dry-run")
    assert {run["state"] for run in facts["runs"]} == {"done"}


@pytest.mark.slow
def test_tree_on_a_trunk_of_two_ranks(shell: Shell, tree: Write, tmp_path: Path) -> None:
    """Branch twice at a time from a run trained elsewhere; the trunk keeps its step."""
    shell("branch", "--tree", tree())
    trunk = shutil.copytree(tmp_path / "tree/runs/trunk", tmp_path / "old")
    shutil.rmtree(trunk / "pins", ignore_errors=True)
    path = tree(
        trunk={"run": str(trunk)},
        folder=str(tmp_path / "other"),
        launch={"processes": 2, "parallel": 2},
    )
    shell("branch", "--tree", path)
    for name in ("short", "long"):
        one, other = (
            comparable(tmp_path / f"tree/runs/{name}"),
            comparable(tmp_path / f"other/runs/{name}"),
        )
        assert [row[0] for row in one] == [row[0] for row in other]
        assert one[:7] == other[:7]
        assert one[-1][3] == pytest.approx(other[-1][3], rel=1e-5), "sums in another order"
    said = shell.json("runs", tmp_path)["runs"]
    (old,) = [one for one in said if one["run"] == "old"]
    assert [one["step"] for one in old["pins"]] == [7, 14]
