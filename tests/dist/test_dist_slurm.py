"""Runs on a real Slurm on this machine: stopped by a signal or a node, requeued, finished."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from gates import LIMIT_S, Gate
from run_folders import events, rows
from slurm_here import Shell, job, slurm
from test_dist_ladder import call, kinds, ladder

__all__ = ["ladder", "slurm"]
Make = Callable[..., RunConfig]
Ladder = Callable[..., Path]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/slurm/train.sbatch"


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT_S)  # Slurm waits two minutes of it
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_puts_the_job_back_and_the_branch_waits(
    ladder: Ladder, slurm: Shell, tmp_path: Path, processes: int
) -> None:
    gate = Gate(tmp_path / "gate", 5)
    environment = gate.environment | {"OMP_NUM_THREADS": "1"}
    setup = "\n".join(f"export {key}={value}" for key, value in environment.items())
    launch = {"kind": "sbatch", "processes": processes, "setup": setup}
    launch["options"] = [f"--cpus-per-task={processes}"]
    path = ladder(widths=[16], launch=launch)
    scripts = json.loads(call("run", path, "--json"))["scripts"]
    slurm(scripts[0])
    until = time.monotonic() + LIMIT_S
    while len(list(gate.folder.iterdir())) < processes:
        assert time.monotonic() < until, "no rank came to the gate"
        time.sleep(0.1)
    slurm("scancel", "--signal=USR1", "1")
    job(slurm, 1, "PENDING")  # a requeued job waits for two minutes
    first, second = (tmp_path / f"ladder/runs/w16-d{tokens}-s0" for tokens in (5120, 10240))
    assert kinds(first) == ["started", "stopped"]
    assert not second.exists()
    job(slurm, 2, "COMPLETED")
    assert kinds(first) == ["started", "stopped", "resumed", "finished"]
    assert [event["signal"] for event in events(first) if event["event"] == "stopped"] == [
        "SIGUSR1"
    ]
    assert kinds(second) == ["branched", "finished"]
    logs = [p.read_text() for p in (tmp_path / "ladder/logs").iterdir()]
    assert len(logs) == 2
    assert not any("Traceback" in text for text in logs)
    assert "Restarts=1 " in slurm("scontrol", "show", "job", "1")
    # Equals bitwise an uninterrupted ladder.
    straight = ladder(
        widths=[16],
        folder=str(tmp_path / "straight"),
        launch={"kind": "local", "processes": processes},
    )
    call("run", straight)
    for folder in (first, second):
        other = tmp_path / "straight/runs" / folder.name
        assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(other)]


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S)
def test_the_branches_of_a_tree_wait_for_their_trunk(
    tiny: Make, slurm: Shell, tmp_path: Path
) -> None:
    tiny("checkpoint.every_steps=null")
    stable = {"schedule": {"kind": "constant", "warmup_steps": 3}}
    decay = {"schedule": {"kind": "linear"}, "run.parent.changes": ["schedule"]}
    described = {
        "kind": "tree",
        "folder": str(tmp_path / "tree"),
        "trunk": {"base": "tiny.yaml", "set": stable | {"training.total_steps": 8}},
        "branches": [
            {"name": "a", "at": 6, "set": decay | {"training.total_steps": 10}},
            {"name": "b", "parent": "a", "at": 8, "set": {"optimizer.lr": 0.002}},
        ],
        "launch": {"kind": "sbatch", "setup": "export OMP_NUM_THREADS=1"},
    }
    path = tmp_path / "tree.yaml"
    path.write_text(json.dumps(described))
    words = [sys.executable, "-m", "allometry.launch.cli", "branch", "--tree", str(path), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    slurm(json.loads(done.stdout)["scripts"][0])
    job(slurm, 3, "COMPLETED")
    runs = [tmp_path / "tree/runs" / name for name in ("trunk", "a", "b")]
    assert [kinds(run) for run in runs] == [
        ["started", "finished"],
        ["branched", "finished"],
        ["branched", "finished"],
    ]
    assert [row["lr"] for row in rows(runs[1])[6:8]] == [0.0075, 0.005]
    assert [row["lr"] for row in rows(runs[2])[8:]] == pytest.approx([0.0005, 0.0])


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT_S)
def test_the_example_of_one_run_goes_on_after_a_node_fails(
    tiny: Make, slurm: Shell, tmp_path: Path
) -> None:
    config = tiny(folder=tmp_path / "run")
    (tmp_path / "run.yaml").write_text(dump(config))
    gate = Gate(tmp_path / "gate", 12)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    exported = gate.environment | {"RANKS_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PATH": path}
    slurm(
        *("sbatch", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=2", "--time=10"),
        f"--output={tmp_path}/log",
        f"--export=ALL,{','.join(f'{key}={value}' for key, value in exported.items())}",
        *(str(EXAMPLE), str(tmp_path / "run.yaml"), config.run.folder),
    )
    until = time.monotonic() + LIMIT_S
    while len(list(gate.folder.iterdir())) < 2:
        assert time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.1)
    node = f"NodeName={socket.gethostname().split('.')[0]}"
    slurm("scontrol", "update", node, "State=DOWN", "Reason=tried")
    job(slurm, 1, "PENDING")
    ranks = [Path(f"/proc/{name.name}") for name in gate.folder.iterdir()]
    until = time.monotonic() + LIMIT_S
    while any(rank.exists() and "State:\tZ" not in rank_status(rank) for rank in ranks):
        assert time.monotonic() < until, "a rank outlived its node"
        time.sleep(0.1)
    gate.open()
    slurm("scontrol", "update", node, "State=RESUME")
    job(slurm, 1, "COMPLETED")
    # Slurm sends SIGTERM before SIGKILL, so the ranks save and stop if they still can.
    found = kinds(Path(config.run.folder))
    assert found in (
        ["started", "resumed", "finished"],
        ["started", "stopped", "resumed", "finished"],
    ), found
    assert [row["step"] for row in rows(Path(config.run.folder))] == list(range(1, 21))


def rank_status(rank: Path) -> str:
    try:
        return (rank / "status").read_text()
    except OSError:  # it has ended in the meantime
        return "State:\tZ"
