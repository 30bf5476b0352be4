"""Servers that fork ranks, so that torch and the trainer are imported once per server.

A server imports the modules that ranks need and then serves requests: fork a process, or return the
exit code of one. A fork only copies the calling thread, so a server must have a single thread: it
creates no process group, computes nothing and does not touch CUDA.

Ranks of one server share the iteration order of sets and numpy's global generator, unlike
independent processes: hence two servers, for even and for odd ranks. Run as a script, this file is
a server.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
IMPORTS = ("pytest", "torch._dynamo", "allometry.trainer.train", "harness")
SERVERS = 2
START_TIMEOUT_S = 120.0
REQUEST_BYTES = 1 << 17  # mainly an environment


@functools.cache
def servers() -> tuple[Server, ...]:
    """Return the servers of these tests, started at the first call."""
    started = tuple(Server() for _ in range(SERVERS))
    for server in started:
        atexit.register(server.close)
        server.wait()
    return started


class Server:
    """Client of a server; the server and its forks end with the client's process."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._link.settimeout(START_TIMEOUT_S)
        self._log = os.memfd_create("log")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )

    def wait(self) -> None:
        """Wait until all imports are done; raise RuntimeError with the log if they fail."""
        self._receive()

    def fork(self, number: int, link: Connection, log: Path) -> Fork:
        """Return a new process that is rank ``number``, serves ``link`` and writes to ``log``.

        Its environment is the caller's current one.
        """
        with log.open("ab") as output:
            request = pickle.dumps(("fork", (number, environment())))
            socket.send_fds(self._link, [request], [link.fileno(), output.fileno()])
            return Fork(self, int(self._answer()))

    def ask(self, what: str, pid: int) -> int | None:
        """Return the exit code of ``fork``'s process; "poll" returns None while
        the process runs."""
        self._link.send(pickle.dumps((what, pid)))
        code: int | None = self._answer()
        return code

    def close(self) -> None:
        """End the server and all processes that it has forked."""
        self._process.kill()
        self._process.wait()
        self._link.close()
        os.close(self._log)

    def _answer(self) -> Any:
        return pickle.loads(self._receive())

    def _receive(self) -> bytes:
        answer = self._link.recv(REQUEST_BYTES)
        if answer:
            return answer
        log = os.pread(self._log, 1 << 20, 0).decode(errors="replace")
        raise RuntimeError(f"the server of ranks ended with {self._process.wait()}\n{log}")


class Fork:
    """Forked process with the interface of ``subprocess.Popen``."""

    def __init__(self, server: Server, pid: int) -> None:
        self._server, self.pid = server, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        if self._code is None:
            self._code = self._server.ask("poll", self.pid)
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self.send_signal(signal.SIGKILL)
        if self._code is None:
            self._code = self._server.ask("wait", self.pid)


def environment() -> dict[str, str]:
    """Return the environment of ranks: one thread each, loopback, and the import paths."""
    places = (ROOT / ".typing", HERE, HERE.parent / "support", os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(str(place) for place in places if place)
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    return os.environ | fixed


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _serve(link: socket.socket) -> None:
    for name in IMPORTS:
        import_module(name)
    gc.collect()
    gc.freeze()  # ranks' collections neither traverse these objects nor copy their pages
    link.send(b"ready")
    while True:
        request, passed, *_ = socket.recv_fds(link, REQUEST_BYTES, 2)
        if not request:
            return
        what, value = pickle.loads(request)
        if what == "fork":
            answer: int | None = _fork(link, passed, *value)
        else:
            pid, status = os.waitpid(value, os.WNOHANG if what == "poll" else 0)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        link.send(pickle.dumps(answer))


def _fork(link: socket.socket, passed: list[int], number: int, env: Mapping[str, str]) -> int:
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads of the server"
    server = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for descriptor in passed:
            os.close(descriptor)
        return pid
    code = 1
    try:
        _end_with(server)
        link.close()
        _be_rank(Connection(passed[0]), passed[1], number, env)
        code = 0
    except BaseException:  # a fork must not continue as a server
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_rank(link: Connection, log: int, number: int, env: Mapping[str, str]) -> None:
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    serve: Callable[[Connection, int], None] = import_module("harness").serve
    serve(link, number)


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    faulthandler.enable()
    _serve(socket.socket(fileno=int(sys.argv[1])))
