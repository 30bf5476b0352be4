"""Our torchrun: retries, and the message to restarted ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from allometry.launch.agent import LoopbackStore, how_ended

RANK = """
import json, os, signal, sys
rank, again = os.environ["RANK"], os.environ.get("ALLOMETRY_RESTART")
with open(sys.argv[1], "a") as file:
    print(json.dumps([rank, again]), file=file)
if again is None:
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # as in a collective that the other never joins; SIGTERM is blocked
sys.exit(2)
"""


def test_a_crash_is_tried_again_and_a_refusal_is_not(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    words = ["-m", "allometry.launch.torchrun", "--nproc-per-node", "2", "--max-restarts", "5"]
    done = subprocess.run(
        [sys.executable, *words, str(tmp_path / "rank.py"), str(tmp_path / "said")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    reason = json.dumps([1, "rank 1 was ended by SIGKILL (out of memory?)"])
    assert sorted(said, key=str) == sorted(
        [["0", None], ["1", None], ["0", reason], ["1", reason]], key=str
    )


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({3: -9, 1: 1}, "rank 3 was ended by SIGKILL (out of memory?)"),
        ({0: 137}, "rank 0 was ended by SIGKILL (out of memory?)"),
        ({2: -11}, "rank 2 was ended by SIGSEGV"),
        ({0: 1, 1: 75}, "rank 0 ended with code 1, rank 1 ended because the run hung"),
        ({0: 255}, "rank 0 ended with code 255"),
    ],
)
def test_how_ranks_ended(codes: dict[int, int], said: str) -> None:
    assert how_ended(codes) == said


def test_a_store_of_one_node_listens_on_loopback_alone() -> None:
    store = LoopbackStore("localhost", 0, is_master=True, multi_tenant=True)
    listening = [
        each.laddr.ip
        for each in psutil.Process().net_connections()
        if each.status == psutil.CONN_LISTEN and each.laddr.port == store.port
    ]
    assert listening == ["127.0.0.1"]
