"""Runs on a real Slurm on this machine: stopped by a signal or a node, requeued, finished.

Needs root and Debian's Slurm (``apt-get install slurm-wlm munge``). The test uses none of the
machine's services: daemons run in a temporary folder, on separate ports.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from gates import LIMIT_S, Gate
from run_folders import events, rows
from test_dist_ladder import call, kinds, ladder

__all__ = ["ladder"]
Make = Callable[..., RunConfig]
Ladder = Callable[..., Path]
Shell = Callable[..., str]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/slurm/train.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Shell]:
    """Yield ``slurm("scontrol", ...)``: output of a command on a one-node cluster, this machine."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"Slurm cannot be started here: not root, or without {', '.join(missing)}")
    place = tmp_path / "slurm"
    for name in ("state", "spool", "munge"):
        (place / name).mkdir(parents=True)
    (place / "munge").chmod(0o700)
    (place / "munge/key").write_bytes(os.urandom(1024))
    (place / "munge/key").chmod(0o400)
    host = socket.gethostname().split(".")[0]
    text = CONFIG.format(host=host, place=place, ports=(free_port(), free_port()))
    (place / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
    files = {"key-file": "munge/key", "socket": "munge.socket", "seed-file": "munge/seed"}
    files |= {"pid-file": "munge/pid", "log-file": "munge/log"}
    munged = [
        "munged",
        "--foreground",
        "--force",
        *(f"--{k}={place / v}" for k, v in files.items()),
    ]
    said = open(place / "daemons.log", "w")  # noqa: SIM115
    daemons = [
        subprocess.Popen(words, env=environment, stdout=said, stderr=said)
        for words in (munged, ["slurmctld", "-D"], ["slurmd", "-D"])
    ]

    def command(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr + (place / "daemons.log").read_text()
        return done.stdout

    try:
        until = time.monotonic() + 60.0
        while time.monotonic() < until:
            done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True)
            if done.stdout.strip() == b"idle":
                break
            time.sleep(0.5)
        yield command
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        said.close()


def job(slurm: Shell, number: int, wanted: str) -> None:
    """Wait until a job reaches a state."""
    until = time.monotonic() + 2 * LIMIT_S
    while f"JobState={wanted} " not in (told := slurm("scontrol", "show", "job", str(number))):
        assert time.monotonic() < until, told
        assert not re.search("JobState=(FAILED|CANCELLED)", told), told
        time.sleep(0.5)


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
