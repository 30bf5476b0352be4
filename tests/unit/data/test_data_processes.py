"""Child processes end with their parent if requested."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from allometry.data.processes import LAUNCHER, end_with_launcher, ended_with_this

CHILD = (
    "import time; from allometry.data.processes import end_with_launcher; end_with_launcher(); "
    "print('up', flush=True); time.sleep(100)"
)
PARENT = f"""
import os, subprocess, sys, time
from allometry.data.processes import ended_with_this
more = ended_with_this() if sys.argv[1] == "asked" else {{}}
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], env=os.environ | more,
    stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(100)
"""


def gone(process: psutil.Process, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
@pytest.mark.parametrize(
    ("asked", "launched", "ends"),
    [("asked", False, True), ("torchrun", True, True), ("a shell", False, False)],
)
def test_a_process_ends_with_the_one_that_started_it(
    asked: str, launched: bool, ends: bool
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != LAUNCHER}
    environment |= {"TORCHELASTIC_RUN_ID": "1"} if launched else {}
    words = [sys.executable, "-c", PARENT, asked]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        try:
            assert gone(child, 10.0 if ends else 0.5) == ends
        finally:
            if child.is_running():
                child.kill()


def test_a_launcher_that_has_ended_before_is_seen() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    there = ended_with_this()[LAUNCHER].partition(" ")[2]
    environment = os.environ | {LAUNCHER: f"{ended.pid} {there}"}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=20)
    assert child.returncode == 1


def test_a_process_that_nobody_launched_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("it asked the kernel"))
    end_with_launcher()
