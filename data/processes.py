"""Child processes that end together with their parent, even if the parent is killed."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading

LAUNCHER = "ALLOMETRY_LAUNCHER"
"""Environment variable with the launcher's process id, for child processes that end with it."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def ended_with_this() -> dict[str, str]:
    """Return environment variables for child processes that are to end with this process.

    For example, ``subprocess.Popen(command, env=os.environ | ended_with_this())``.
    """
    return {LAUNCHER: f"{os.getpid()} {_namespace()}"}


def end_with_launcher() -> None:
    """Let the kernel end this process with its parent, if that is torchrun or set LAUNCHER.

    Other parents, such as a shell, may end first. Linux only. An end of the parent before this call
    is detected only if the parent set its id and shares the PID namespace.
    """
    launcher = os.environ.get(LAUNCHER)
    if sys.platform != "linux" or (launcher is None and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    process, _, namespace = (launcher or "").partition(" ")
    if process and namespace == _namespace() and not os.path.exists(f"/proc/{process}"):
        os._exit(1)


def _namespace() -> str:
    """Return the PID namespace; a container may have its own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def name_rank(rank: str) -> None:
    """Name this process ``rank N`` for ps, top and debuggers (Linux), also after a fork."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank {rank}".encode())


def end_with_parent() -> None:
    """In a process of a pool: end as soon as the process that started the pool has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
