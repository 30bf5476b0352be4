"""``allometry runs`` and ``allometry branch``: states, trees, pins and refusals."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.pins import pins
from allometry.trainer.state.status import last_row, status_of
from allometry.trainer.train import train
from fake_runs import fake_run
from run_folders import rows
from shell import Shell

Make = Callable[..., RunConfig]
SMALL = {
    "run": {"folder": "replaced"},
    "model": {
        "kind": "dense",
        "vocab_size": 64,
        "width": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn_width": 32,
    },
    "data": {"sequence_length": 32, "sources": [{"name": "replaced", "train": "replaced"}]},
    "batch": {"sequences": 8, "micro_batch_sequences": 8},
    "training": {"total_steps": 20, "compute_dtype": "fp32"},
    "optimizer": {"lr": 1e-2},
    "schedule": {"kind": "constant", "warmup_steps": 3},
    "checkpoint": {"every_steps": 5, "keep_steps": [8]},
    "record": {"tensorboard": False},
}
STABLE = ("schedule={kind: constant, warmup_steps: 3}", "checkpoint.keep_steps=[8]")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


@pytest.fixture(scope="module")
def stable(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Return a trunk that keeps step 8 and was stopped there, to be copied."""
    folder = tmp_path_factory.mktemp("stable")
    path = folder / "run.yaml"
    path.write_text(json.dumps(SMALL))
    sources = [{"name": name, "train": f"{tiny_store}/{name}.train"} for name in ("up", "down")]
    config = load(path, [f"run.folder={folder}/trunk", f"data.sources={json.dumps(sources)}"])
    run(config, stop=8)
    return config


@pytest.fixture
def trunk(stable: RunConfig, tmp_path: Path) -> Path:
    return shutil.copytree(stable.run.folder, tmp_path / "trunk")


def states(shell: Shell, folder: Path) -> dict[str, str]:
    return {one["run"]: one["state"] for one in shell.json("runs", folder)["runs"]}


def test_states_are_what_the_folders_say(shell: Shell, tmp_path: Path) -> None:
    for name, ending in (("done", "finished"), ("halted", "stopped"), ("broken", "not_finite")):
        fake_run(tmp_path / name, ending=ending)
    fake_run(tmp_path / "cut", ending="started")
    fake_run(tmp_path / "alive", ending="started")
    folder = RunFolder(tmp_path / "alive")
    folder.claim()
    # A finished run that was resumed and then died has not ended.
    fake_run(tmp_path / "again")
    with open(tmp_path / "again" / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 0, "event": "resumed", "step": 20}) + "\n")
    # A dead process holds no lock, whatever its lock file contains.
    (tmp_path / "cut" / "run.lock").write_text(
        f"process 999999999 on {socket.gethostname()} since Thu"
    )
    assert states(shell, tmp_path) == {
        "done": "ended",
        "halted": "stopped",
        "broken": "diverged",
        "cut": "crashed",
        "alive": "running",
        "again": "crashed",
    }
    folder.release()
    assert states(shell, tmp_path)["alive"] == "crashed"


def test_a_lock_of_another_machine_is_said(shell: Shell, tmp_path: Path) -> None:
    fake_run(tmp_path / "far", ending="started")
    (tmp_path / "far" / "run.lock").write_text("process 1 on elsewhere since Thu")
    assert "running where its lock is not seen from here: far on elsewhere" in shell(
        "runs", tmp_path
    )
    with open(tmp_path / "far" / "run.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert states(shell, tmp_path) == {"far": "running"}


def test_what_is_no_run_is_passed_over_aloud(shell: Shell, tmp_path: Path) -> None:
    fake_run(tmp_path / "here")
    fake_run(tmp_path / "ladder" / "runs" / "w32")
    (tmp_path / "ladder" / "configs").mkdir()
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    fake_run(tmp_path / "torn")
    (tmp_path / "torn" / "config.yaml").write_text("a: [")
    said = shell.json("runs", tmp_path)
    assert [one["run"] for one in said["runs"]] == ["here", "ladder/runs/w32"]
    torn, notes = sorted(said["passed_over"], reverse=True)
    assert torn.startswith(f"{tmp_path}/torn is passed over: ")
    assert notes == f"{tmp_path}/notes is passed over: it is no run's folder."
    assert shell.refusal("runs", tmp_path / "notes").startswith(
        f"allometry: {tmp_path}/notes holds no run (" + f"{tmp_path}/notes/deep"
    )
    assert "is not a folder" in shell.refusal("runs", tmp_path / "absent")


def test_a_folder_called_runs_hides_no_other(shell: Shell, tmp_path: Path) -> None:
    fake_run(tmp_path / "one")
    fake_run(tmp_path / "runs" / "two")
    listed = shell.json("runs", tmp_path)
    assert {Path(run["folder"]).name for run in listed["runs"]} == {"one", "two"}


def test_last_row_of_long_and_torn_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    long = {"step": 1, "pad": "x" * 200_000}
    path.write_text(json.dumps(long) + "\n" + '{"step": 2, "pa')
    assert last_row(path)["step"] == 1
    path.write_text('{"step": 2, "pa')
    assert last_row(path) == {}


def test_branch_by_reference_trained_and_listed(shell: Shell, tiny: Make, tmp_path: Path) -> None:
    """Full life of a branch: configured, pinned, kept by retention, trained, listed, released."""
    quick = ("checkpoint.every_steps=2", "checkpoint.keep_last=1")
    trunk_config = tiny(
        "schedule={kind: constant, warmup_steps: 3}", *quick, folder=tmp_path / "runs" / "trunk"
    )
    trunk = run(trunk_config, stop=14)
    decay = tmp_path / "decay.yaml"
    decay.write_text("schedule: {kind: wsd, warmup_steps: 3, decay_fraction: 0.3}\n")
    said = shell.json("branch", trunk, "--at", 14, "--config", decay)
    branch = tmp_path / "runs" / "trunk-decay-14"
    assert said == {
        "run": str(branch),
        "config": f"{branch}/branch.yaml",
        "changes": [
            {"key": f"schedule.{key}", "before": before, "after": after}
            for key, before, after in (
                ("decay", None, "1-sqrt"),
                ("decay_fraction", None, 0.3),
                ("final_fraction", None, 0.0),
                ("kind", "constant", "wsd"),
            )
        ],
        "parent": str(trunk),
        "step": 14,
        "pinned": True,
        "total_steps": 20,
        "command": f"allometry train {branch}/branch.yaml",
    }
    assert shell.json("branch", trunk, "--at", 14, "--config", decay) == said, "twice is once"
    assert states(shell, tmp_path / "runs") == {"trunk": "stopped", "trunk-decay-14": "new"}

    run(trunk_config, stop=18)
    there = [path.name for path in (trunk / "checkpoints").iterdir()]
    assert sorted(there) == ["step-14", "step-18"], "step 16 went, 14 is pinned"

    run(load(said["config"]))
    straight = run(tiny(*quick, folder=tmp_path / "straight"))
    assert [row["loss"] for row in rows(branch)] == [row["loss"] for row in rows(straight)]
    listed = shell.json("runs", tmp_path / "runs")
    one, other = listed["runs"]
    assert (other["parent"], other["parent_step"], other["state"]) == ("trunk", 14, "ended")
    assert one["pins"] == [{"step": 14, "by": str(branch), "missing": False}]
    table = shell("runs", tmp_path / "runs", "--tree")
    assert "\n  trunk-decay-14  ended" in table
    assert "14 (pinned by trunk-decay-14)" in table

    shutil.rmtree(branch)
    run(trunk_config)
    assert [path.name for path in (trunk / "checkpoints").iterdir()] == ["step-20"]


def test_shared_checkpoints_count_once(shell: Shell, tiny: Make, tmp_path: Path) -> None:
    trunk = run(tiny(*STABLE, folder=tmp_path / "runs" / "trunk"), stop=8)
    run(
        tiny(
            f"run.parent={{folder: {trunk}, step: 8}}",
            *STABLE,
            folder=tmp_path / "runs" / "branch",
        ),
        stop=9,
    )
    assert (trunk / "pins").is_dir(), "one that was described by hand is pinned, too"
    said = shell.json("runs", tmp_path / "runs")
    total = sum(one["bytes"] for one in said["runs"])
    shard = trunk / "checkpoints" / "step-8" / "__0_0.distcp"
    assert total - said["bytes"] >= shard.stat().st_size
    on_disk = {
        (stat.st_dev, stat.st_ino): stat.st_blocks * 512
        for path in (tmp_path / "runs").rglob("*")
        if path.is_file()
        for stat in [path.stat()]
    }
    assert said["bytes"] == sum(on_disk.values())


def test_a_pin_holds_while_the_disk_of_the_branch_is_away(tmp_path: Path) -> None:
    from allometry.trainer.state.pins import pin

    trunk, disk = tmp_path / "trunk", tmp_path / "disk"
    trunk.mkdir()
    (disk / "branch").mkdir(parents=True)
    (disk / "branch" / "branch.yaml").touch()
    pin(trunk, 8, disk / "branch")
    (trunk / "pins" / "step-9.torn.json").write_text("{")
    assert [(one.step, one.missing) for one in pins(trunk)] == [(8, False)]
    disk.rename(tmp_path / "away")
    assert [(one.step, one.missing) for one in pins(trunk)] == [(8, True)]
    (disk).mkdir()
    assert pins(trunk) == [], "the disk is there and the branch is not"


def test_a_trunk_that_cannot_be_written_is_branched_all_the_same(
    shell: Shell, trunk: Path, tmp_path: Path
) -> None:
    (trunk / "pins").write_text("a file where the folder would be")
    said = shell.json("branch", trunk, "--at", 8, "--set", "training.total_steps=12")
    assert not said["pinned"]
    run(load(said["config"]))
    assert status_of(Path(said["run"])).state == "ended"


REFUSED = (
    ((), "name the run to branch from"),
    (("--at", 9), "has those of 5, 8"),
    (("--at", 8, "--set", "batch.sequences=16"), "batch.sequences=16 differs from 8"),
    (("--at", 8, "--set", "schedule.kind=cosine"), "run.parent.changes=[schedule]"),
    (("--at", 8, "--set", "optimizer.kind=muon"), "run.initial={folder: "),
    (("--at", 8, "--set", "run.parent.changes=[dta]"), "'dta' is no key of this run"),
    (("--at", 8, "--set", "optimizer.lr"), "expected section.key=value"),
    (("--at", 8, "--set", "optimizer.rl=1"), "optimizer.rl is not a known key"),
    (("--at", 8, "--set", "training.total_steps=8"), "is the last of the branch's 8 steps"),
    (("--at", 8, "--config", "preset:ladder_demo"), "preset:ladder_demo is"),
    (("--at", 8, "--parallel", 2), "--parallel does not go with a single branch"),
    (("--tree", "absent.yaml"), "RUN does not go with --tree"),
    (("--at", 8, "--run", "taken"), "holds another run"),
    (("--at", 8, "--run", "runs/branch"), "--run=runs/branch is a path"),
    (("--at", 8, "--run", "../evil"), "--run=../evil is a path"),
)


def test_refusals_leave_nothing(shell: Shell, trunk: Path, tmp_path: Path) -> None:
    fake_run(tmp_path / "taken")
    before = sorted(tmp_path.iterdir())
    for arguments, sentence in REFUSED:
        assert sentence in shell.refusal("branch", trunk, *arguments)
    assert "holds no run to branch from" in shell.refusal("branch", tmp_path, "--at", 8)
    assert sorted(tmp_path.iterdir()) == before
    assert not (trunk / "pins").exists()


def test_a_branch_says_what_it_changes(shell: Shell, trunk: Path) -> None:
    """Keys are declared automatically; a schedule counted from the branch is
    declared by the user."""
    words = ("--set", "optimizer.lr=1e-3", "--set", "data.sources.1.weight=0.5")
    named = ("--set", "run.parent.changes=[schedule]", "--set", "schedule.kind=cosine")
    said = shell("branch", trunk, "--at", 8, *words, *named)
    assert "  optimizer.lr is 0.001; it was 0.01\n" in said
    assert "  data.sources.down.weight is 0.5; it was 1.0\n" in said
    config = load(trunk.parent / "trunk-branch-8/branch.yaml")
    assert config.run.parent is not None
    assert config.run.parent.changes == ("schedule", "data", "optimizer.lr")
    plan = shell.json("train", trunk.parent / "trunk-branch-8/branch.yaml", "--dry-run")
    rates = {corner["step"]: corner["lr"] for corner in plan["learning_rate"]}
    assert min(rates) == 9
    assert rates[11] == 1e-3, "the end of its own warm-up of 3 steps"
    assert plan["data"]["sources"]["up"]["tokens"] > 8 * 256 / 2, "with what its trunk has read"


def test_a_length_in_the_other_unit(shell: Shell, trunk: Path, tmp_path: Path) -> None:
    longer = shell.json("branch", trunk, "--at", 8, "--set", "training.total_tokens=7680")
    assert longer["total_steps"] == 30
    path = tmp_path / "more.yaml"
    path.write_text("training: {total_tokens: 6400}\n")
    assert shell.json("branch", trunk, "--at", 8, "--config", path)["total_steps"] == 25
    assert os.path.isdir(tmp_path / "trunk-more-8")
