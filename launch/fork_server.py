"""Fork server: a process of the agent that imports the ranks' modules and forks the ranks.

Importing torch and this package takes seconds of CPU time, for each rank, at each restart. The
agent therefore starts one process with the ranks' own command line, which imports and then waits;
at a restart, each rank is a fork of this process. Forked ranks are children of the agent, like
ranks that the agent starts directly: the intermediate process exits, and the agent is the subreaper
of its orphans (prctl(2), PR_SET_CHILD_SUBREAPER).

A fork copies only one thread, so the server exits without forking if its imports have started other
threads. The agent then starts ranks directly, as after any failure of the server. The server cannot
have touched a GPU: importing does not initialize CUDA.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from allometry.data.processes import end_with_launcher

SERVER = "ALLOMETRY_FORK_SERVER"
"""Environment variable: ``0`` in a launcher disables the fork server.

In the server process: the file descriptor of its socket.
"""
MODULE = ("-m", "allometry.launch.train")
"""Module of the ranks' command line that a server can fork."""
START_TIMEOUT_S = 300.0
"""Seconds that the server may take to import and fork."""
ADOPTION_TIMEOUT_S = 30.0
_PR_SET_CHILD_SUBREAPER = 36
_MESSAGE_BYTES = 1 << 18


class ForkServer:
    """The agent's end of the connection; ``pid`` of the server, None before ``start``."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._usable = sys.platform == "linux" and os.environ.get(SERVER) != "0"
        self._link: socket.socket | None = None
        self._command: list[str] = []
        self._environment: dict[str, str] = {}

    def start(self, command: Sequence[str]) -> None:
        """Start the server, unless one is running or ranks of this command cannot be forked."""
        if not self._usable or self._link is not None or tuple(command[2:4]) != MODULE:
            return
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(START_TIMEOUT_S)
        self._command, self._environment = list(command), dict(os.environ)
        with theirs:
            process = subprocess.Popen(
                command,
                env=os.environ | {SERVER: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the ranks report errors of the command
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pid = process.pid

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], outputs: tuple[int, int]
    ) -> Forked | None:
        """Return a new process that runs ``command``, or None if the server cannot fork it.

        ``outputs``: file descriptors of its standard output and error.
        """
        if not self._usable or self._link is None or list(command) != self._command:
            return None
        before = self._environment
        order = {
            "set": {name: text for name, text in environment.items() if before.get(name) != text},
            "unset": [name for name in before if name not in environment],
        }
        try:
            socket.send_fds(self._link, [json.dumps(order).encode()], list(outputs))
            answer = self._link.recv(64)
        except OSError:
            answer = b""
        if not answer:
            self._usable = False
            self._link.close()
            return None
        return Forked(int(answer))


class Forked:
    """Forked rank, with the methods of ``subprocess.Popen`` that torchrun's agent uses."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, -N for signal N, or None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; raises ``subprocess.TimeoutExpired`` after ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() >= end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def is_server() -> bool:
    """Return True if the agent has started this process as its fork server."""
    return os.environ.get(SERVER, "0") != "0"


def become_rank(imports: Callable[[], None]) -> None:
    """In a server: run ``imports``, then serve forks; returns only in each forked process."""
    descriptor = os.environ.pop(SERVER)
    imports()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        os._exit(1)
    agent = os.getppid()
    link = socket.socket(fileno=int(descriptor))
    while True:
        try:
            message, outputs, _, _ = socket.recv_fds(link, _MESSAGE_BYTES, 2)
        except OSError:
            os._exit(1)
        if not message:  # the agent has ended
            os._exit(0)
        pid = _fork_away(
            lambda message=message, outputs=outputs: _settle(agent, json.loads(message), outputs)
        )
        if pid is None:
            link.close()
            return
        for each in outputs:
            os.close(each)
        link.send(str(pid).encode())


def _fork_away(settle: Callable[[], None]) -> int | None:
    """Fork a process that is not a child of this process.

    Returns None in the new process; in this process, its pid once ``settle`` has run there.
    """
    reading, writing = os.pipe()
    between = os.fork()
    if between == 0:
        if pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
        os.close(reading)
        settle()
        os.close(writing)
        return None
    os.close(writing)
    os.waitpid(between, 0)
    with os.fdopen(reading, "rb") as read:
        return int(read.read())  # reads until the new process has closed its end as well


def _settle(agent: int, order: dict[str, dict[str, str]], outputs: Sequence[int]) -> None:
    """Take the parent, session, outputs and environment of a process that the agent would start."""
    end = time.monotonic() + ADOPTION_TIMEOUT_S
    while os.getppid() != agent:
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0.001)
    os.setsid()
    for number, each in enumerate(outputs, 1):
        os.dup2(each, number)
        with suppress(OSError):
            os.close(each)
    for name in order["unset"]:
        os.environ.pop(name, None)
    os.environ.update(order["set"])
    end_with_launcher()
