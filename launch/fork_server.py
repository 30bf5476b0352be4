"""A process of the agent's that has imported what ranks import, and forks the ranks.

Importing torch and this package takes seconds of a processor, for each rank, at each restart. So
the agent starts one process with the ranks' own command line, which imports and then waits: when
ranks are started again, each is a fork of it. Ranks are children of the agent, as those that it
starts by itself: the process between ends, and the agent is the subreaper of what it leaves
(prctl(2), PR_SET_CHILD_SUBREAPER).

A fork copies one thread only, so the server forks nothing if its imports started others; the agent
then starts ranks by itself, as it does wherever the server fails. It cannot have touched a GPU:
importing does not initialize CUDA.
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
"""Environment variable: in a launcher's, ``0`` lets it start ranks by itself; in that of a server,
the descriptor of its socket."""
MODULE = ("-m", "allometry.launch.train")
"""What the command of a rank has, if a server can fork it."""
START_TIMEOUT_S = 300.0
"""Seconds that the server may take to import and fork."""
ADOPTION_TIMEOUT_S = 30.0
_PR_SET_CHILD_SUBREAPER = 36
_MESSAGE_BYTES = 1 << 18


class ForkServer:
    """The agent's end. ``pid`` of the server, None while there is none."""

    def __init__(self) -> None:
        self.pid: int | None = None
        self._usable = sys.platform == "linux" and os.environ.get(SERVER) != "0"
        self._link: socket.socket | None = None
        self._command: list[str] = []
        self._environment: dict[str, str] = {}

    def start(self, command: Sequence[str]) -> None:
        """Let a server import, unless there is one or ranks of this command are not forked."""
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
                stdout=subprocess.DEVNULL,  # what is wrong with the command, ranks say
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.pid = process.pid

    def fork(
        self, command: Sequence[str], environment: Mapping[str, str], outputs: tuple[int, int]
    ) -> Forked | None:
        """Return a new process that does ``command``, or None if it must be started otherwise.

        ``outputs``: descriptors of its standard output and error.
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
    """A forked rank, with what torchrun's agent uses of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, -N for signal N, or None while it runs."""
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
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def is_server() -> bool:
    """Whether the agent has started this process to fork ranks."""
    return os.environ.get(SERVER, "0") != "0"


def become_rank(imports: Callable[[], None]) -> None:
    """In a server: do ``imports``, then return in each process that is forked, and there alone."""
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
        if not message:  # the agent is gone
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
    """Fork a process that this one is not the parent of: None in it; here its id, once settled."""
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
        return int(read.read())  # to its end: the process has closed it, too


def _settle(agent: int, order: dict[str, dict[str, str]], outputs: Sequence[int]) -> None:
    """Become what the agent would have started: its child, session, outputs and environment."""
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
