"""Restarted ranks are forked from a process that has imported their modules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

# The agent's actions, in a separate process, because it adopts orphans.
AGENT = """
import json, os, sys, time
from pathlib import Path
from allometry.launch.fork_server import ForkServer

place = Path(sys.argv[1])
command = [sys.executable, "-u", "-m", "allometry.launch.train", *sys.argv[2:]]
server = ForkServer()
early = server.fork(command, dict(os.environ), (1, 2))
os.environ["GONE"] = "1"
server.start(command)
told = []
for rank in range(3):
    with open(place / f"out-{rank}", "wb") as out, open(place / f"err-{rank}", "wb") as err:
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3"}
        del environment["GONE"]
        begun = time.monotonic()
        forked = server.fork(command, environment, (out.fileno(), err.fileno()))
        if forked is None:
            told.append(None)
            continue
        fields = Path(f"/proc/{forked.pid}/stat").read_text().rpartition(")")[2].split()
        told.append([forked.wait(60), int(fields[1]) == os.getpid(), int(fields[3]) == forked.pid])
other = server.fork([*command, "--no-such"], dict(os.environ), (1, 2))
print(json.dumps({"early": early is None, "other": other is None, "ranks": told}))
"""


def agent(place: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    import os

    done = subprocess.run(
        [sys.executable, "-c", AGENT, str(place), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_forked_ranks_are_what_the_agent_would_have_started(tmp_path: Path) -> None:
    told = agent(tmp_path, str(tmp_path / "none.yaml"))
    assert told["early"], "before there is a server, ranks are started otherwise"
    assert told["other"], "another command is no rank of this server"
    assert told["ranks"] == [[2, True, True]] * 3, "code, the agent's child, its own session"
    errors = [(tmp_path / f"err-{rank}").read_text() for rank in range(3)]
    assert errors[0].count("none.yaml") == 1
    assert errors[1:] == ["", ""], "the main rank alone says it, so each knows its own RANK"


def test_where_the_server_fails_the_agent_is_told(tmp_path: Path) -> None:
    assert agent(tmp_path, "--allocator=none-such", "x.yaml")["ranks"] == [None] * 3


def test_a_server_is_refused_by_its_variable(tmp_path: Path) -> None:
    assert agent(tmp_path, "x.yaml", ALLOMETRY_FORK_SERVER="0")["ranks"] == [None] * 3
