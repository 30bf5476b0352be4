"""Signals that request a run to stop: kinds, times, and repetitions."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer import stop
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.stop import STOP_SIGNALS, StopSignals
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Restore handlers and the mask after any test, under nohup too."""
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_kept(number: signal.Signals) -> None:
    heard: list[signal.Signals] = []
    with StopSignals(heard.append) as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert signals.received == number
    assert heard == [number]


def test_a_second_ctrl_c_interrupts_unless_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        monkeypatch.setattr(stop, "TWICE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_keeps_a_run_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_came_while_it_was_blocked_is_received() -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        # To this thread, because other threads of the test's process do not block the signal.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with StopSignals() as signals:
            assert signals.received == signal.SIGUSR1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def test_a_signal_before_the_first_step_takes_none(tiny: Make) -> None:
    config = tiny()
    folder = Path(config.run.folder)
    for number, taken in ((signal.SIGTERM, 0), (None, 7), (signal.SIGHUP, 7)):
        signals = StopSignals()
        signals.received = number
        end = None if number else 7
        options = {"device": torch.device("cpu"), "callbacks": [], "stop_at_step": end}
        train(config, signals=signals, **options)
        assert len(rows(folder)) == taken
        assert events(folder)[-1]["event"] == "stopped"


def test_a_signal_during_the_last_checkpoint_does_not_undo_the_run(tiny: Make) -> None:
    class Late(Callback):
        def finish(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny("training.total_steps=5")
    train(config, device=torch.device("cpu"), callbacks=[Late()])
    assert events(Path(config.run.folder))[-1]["event"] == "finished"


LATE = """
import atexit, os, signal, sys
from allometry.trainer.stop import StopSignals

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)  # while modules are taken apart

with StopSignals(to_the_end=sys.argv[1] == "True"):
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
sys.late = Late()
print("all is saved")
"""


def test_a_signal_at_the_end_of_a_process_does_not_change_its_exit_code() -> None:
    def ended(to_the_end: bool) -> int:
        command = [sys.executable, "-c", LATE, str(to_the_end)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == "all is saved\n"
        return done.returncode

    assert ended(True) == 0
    assert ended(False) != 0


def test_torchrun_that_has_no_ranks_yet_ends_as_signals_end_programs() -> None:
    """Ranks that never started save no checkpoint; torchrun waits here for a second node."""
    node = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "allometry.launch.torchrun", *node, "-m", "none"],
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120.0
    while not blocked(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said


def blocked(process_id: int) -> bool:
    """Return whether a process's main thread blocks SIGTERM, so that another thread handles it."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    mask = int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)
