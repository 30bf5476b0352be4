"""Real processes: kill -9 under torchrun, restarts, stop signals, two runs in one folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from gates import LIMIT_S, Gate
from run_folders import events, rows
from test_dist_auto_layout import card
from test_dist_runs import launch

Make = Callable[..., RunConfig]
Ranks = Callable[..., list[Any]]
Start = Callable[..., subprocess.Popen[str]]
LONG = ("training.total_steps=80", "checkpoint.every_steps=10", "record.display_every_steps=50")


UNTIL_IT_ENDS = 10_000
"""Number of signals, a hundredth of a second apart."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Yield ``start(config, ranks)``, which runs a user's command without nohup.

    Crashed ranks are restarted; ``plain``: torch's torchrun.
    """
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    started: list[subprocess.Popen[str]] = []

    def begin(
        config: RunConfig,
        ranks: int = 1,
        gate: Gate | None = None,
        *options: str,
        plain: bool = False,
    ) -> subprocess.Popen[str]:
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        module = ["-m", "allometry.launch.train", str(path)]
        if ranks > 1:
            torchrun = "torch.distributed.run" if plain else "allometry.launch.torchrun"
            options = options or ("--nproc-per-node", str(ranks))
            module = ["-m", torchrun, *options, "--max-restarts", "3", *module]
        process = subprocess.Popen(
            [sys.executable, *module],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (gate.environment if gate else {}),
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            kill_group(process)
    signal.signal(signal.SIGHUP, hang_up)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    return output


def comparable(folder: Path) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "grad_norm", "lr", "s1", "s2", "tokens/up", "loss/up")
    return [tuple(row.get(key) for key in keys) for row in rows(folder)]


def test_kill_9_twice_under_torchrun_loses_nothing(
    tiny: Make, start: Start, run_ranks: Ranks, tmp_path: Path
) -> None:
    straight = tiny(*LONG, folder=tmp_path / "straight")
    run_ranks(launch, 2, straight)
    killed = tiny(*LONG, folder=tmp_path / "killed")
    folder = Path(killed.run.folder)
    for step in (26, 76):
        gate = Gate(tmp_path / f"gate-{step}", step)
        process = start(killed, ranks=2, gate=gate)
        gate.wait(process, ranks=2)
        kill_group(process)
    output = finish(start(killed, ranks=2))
    assert "continuing after step" in output
    assert comparable(folder) == comparable(Path(straight.run.folder))
    resumed = [event["step"] for event in events(folder) if event["event"] == "resumed"]
    assert len(resumed) == 2
    assert 0 < resumed[0] < resumed[1]


@pytest.mark.parametrize(
    ("ranks", "plain"),
    [
        (2, False),
        pytest.param(4, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_ranks_restart_when_one_is_killed(
    tiny: Make, start: Start, run_ranks: Ranks, tmp_path: Path, ranks: int, plain: bool
) -> None:
    import psutil

    straight = tiny(*LONG, folder=tmp_path / "straight")
    killed = tiny(*LONG, "run.resume=never", folder=tmp_path / "killed")
    gate = Gate(tmp_path / "gate", 26)
    process = start(killed, ranks, gate, plain=plain)
    gate.wait(process, ranks)
    victim = next(
        each
        for each in psutil.Process(process.pid).children()
        if each.name() == f"rank {ranks - 1}"
    )
    victim.kill()
    gate.open()
    finish(process)
    folder = Path(killed.run.folder)
    said = [event for event in events(folder) if event["event"] in ("restarted", "resumed")]
    known = "not known" if plain else f"rank {ranks - 1} was ended by SIGKILL (out of memory?)"
    assert [event.get("reason", event.get("checkpoint")) for event in said] == [known, "step-20"]
    run_ranks(launch, ranks, straight)
    assert comparable(folder) == comparable(Path(straight.run.folder))


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_ranks_end_with_their_launcher(
    tiny: Make, start: Start, tmp_path: Path, plain: bool
) -> None:
    import psutil

    gate = Gate(tmp_path / "gate", 3)
    process = start(tiny(*LONG), 2, gate, plain=plain)
    gate.wait(process, ranks=2)
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10.0
    while any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fixed", "auto"])
def test_fewer_nodes_go_on_with_a_layout_of_their_own(
    tiny: Make, start: Start, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes of one rank each on loopback: one is lost together with its agent."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    auto = f"parallel={{auto: {{cluster: {card(tmp_path / 'card.yaml')}}}}}"
    config = tiny(*LONG, auto if layout == "auto" else "parallel.zero.stage=1")
    port = free_port()
    options = (
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "elastic"),
        *("--local-addr", "127.0.0.1", "--rdzv-conf"),
        "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3",
    )
    gate = Gate(tmp_path / "gate", 26)
    stays = start(config, 2, gate, *options)
    until = time.monotonic() + LIMIT_S
    while socket.socket().connect_ex(("127.0.0.1", port)):  # the first node hosts the rendezvous
        assert time.monotonic() < until
        time.sleep(0.1)
    lost = start(config, 2, gate, *options)
    gate.wait(stays, ranks=2)
    lost.kill()
    gate.open()
    finish(stays)
    folder = Path(config.run.folder)
    assert [row["step"] for row in rows(folder)] == list(range(1, 81))
    launches = json.loads((folder / "run.json").read_text())["launches"]
    begun = [(each["first_step"], each["layout"]["world_size"]) for each in launches]
    assert begun == [(1, 2), (21, 1)]
    restarted = [event for event in events(folder) if event["event"] == "restarted"]
    assert [event["count"] for event in restarted] == [1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL torchrun and every worker: torchrun gives workers their own sessions."""
    import psutil

    workers = psutil.Process(process.pid).children(recursive=True)
    for victim in [*workers, process]:
        victim.kill()
    process.communicate()
    psutil.wait_procs(workers, timeout=10)


@pytest.mark.parametrize(
    ("ranks", "number", "times"),
    [
        pytest.param(1, signal.SIGTERM, 1, marks=pytest.mark.slow),
        (1, signal.SIGINT, 2),  # Ctrl-C pressed twice
        (1, signal.SIGHUP, 1),
        (2, signal.SIGUSR1, 1),
        # Slurm sends it to torchrun and to the ranks.
        pytest.param(2, signal.SIGTERM, 2, marks=pytest.mark.slow),
        (1, signal.SIGTERM, UNTIL_IT_ENDS),
        (2, signal.SIGTERM, UNTIL_IT_ENDS),
    ],
)
def test_a_signal_saves_and_ends_cleanly(
    tiny: Make, start: Start, tmp_path: Path, ranks: int, number: signal.Signals, times: int
) -> None:
    config = tiny(*LONG, "checkpoint.every_steps=null")
    folder = Path(config.run.folder)
    gate = Gate(tmp_path / "gate", 11)
    process = start(config, ranks, gate=gate)
    gate.wait(process, ranks)
    while times and process.poll() is None:
        process.send_signal(number)
        times -= 1
        time.sleep(0.01 if times > 1 else 0.0)
    output = finish(process)
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output
    last = rows(folder)[-1]["step"]
    # Ranks' flags are read one step later.
    assert last in ((11,) if ranks == 1 else (11, 12, 13))
    assert (folder / "latest").read_text().strip() == f"step-{last}"
    assert events(folder)[-1] | {"time": 0} == {
        "event": "stopped",
        "time": 0,
        "step": last,
        "signal": number.name,
    }


def test_two_ranks_refuse_with_one_sentence_and_code_2(tiny: Make, start: Start) -> None:
    process = start(tiny("data.sources.0.train=nowhere"), ranks=2)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 2, output
    assert output.count("allometry: token file nowhere.bin does not exist") == 1
    assert "Traceback" not in output


def test_second_live_run_in_a_folder_is_refused(tiny: Make, start: Start, tmp_path: Path) -> None:
    config = tiny(*LONG)
    gate = Gate(tmp_path / "gate", 2)
    first = start(config, gate=gate)
    gate.wait(first)
    second = start(config)
    output, _ = second.communicate(timeout=LIMIT_S)
    assert second.returncode == 2
    lines = [line for line in output.splitlines() if line.startswith("allometry: ")]
    assert len(lines) == 1
    assert f"in use by process {first.pid}" in lines[0]
    assert "Traceback" not in output
    gate.open()
    finish(first)


def test_sums_of_a_run_do_not_depend_on_the_processes(tiny: Make) -> None:
    """The in-process path of other tests is the path of the command."""
    config = tiny()
    train(config, callbacks=[])
    described = json.loads((Path(config.run.folder) / "run.json").read_text())
    assert described["layout"]["world_size"] == 1
    assert [launch["first_step"] for launch in described["launches"]] == [1]
