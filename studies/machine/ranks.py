"""Concurrent processes of this machine: remaining rates, and times of messages."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.studies.machine.pieces import Clock, measured_at, pieces
from allometry.studies.selftest.messages import Message
from allometry.studies.selftest.network import time_messages

SMALL, LARGE = 2**10, 2**23
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "send forward")
ROUNDS, SLICE_S = 5, 0.2
TIMES = 3
"""Number of medians whose minimum is the time of a message."""


def measure_alone(environment: Mapping[str, str], dtypes: tuple[str, ...]) -> dict[str, Any]:
    """Return ``pieces`` of a new process with ``environment``, such as a memory allocator's."""
    return _answer(_alone, (torch.get_num_threads(), dtypes), 1, environment)


def measure_ranks(
    ranks: int, threads: int, alone: int, seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return measurements of ``ranks`` concurrent processes with ``threads`` threads each (JSON).

    ``crowd`` (on a CPU): rates of products and copies when all ranks compute, relative to one rank
    with ``alone`` threads; medians over rounds that alternate both. ``messages``: seconds of a
    small and a large message of each kind. ``seconds``: approximate time for messages. For example,
    ``measure_ranks(4, 1, 4, 12.0, {})["crowd"]``.
    """
    asked = (ranks, threads, alone, seconds, free_port())
    return _answer(_rank, asked, ranks, environment)


def _answer(
    work: Callable[..., None], asked: tuple[Any, ...], ranks: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Return the JSON in the file ``out`` that processes of ``work(rank, *asked, out)`` write."""
    with tempfile.TemporaryDirectory(prefix="allometry-machine-") as scratch:
        out = Path(scratch) / "found.json"
        with added(environment):
            torch.multiprocessing.start_processes(
                work, args=(*asked, out), nprocs=ranks, start_method="spawn"
            )
        found: dict[str, Any] = json.loads(out.read_text())
    return found


@contextmanager
def added(environment: Mapping[str, str]) -> Iterator[None]:
    """Return a context in which started processes have these environment variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _alone(_: int, threads: int, dtypes: tuple[str, ...], out: Path) -> None:
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.write_text(json.dumps(pieces(Clock(device), dtypes)))


def free_port() -> int:
    """Return an unused TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _rank(
    rank: int, ranks: int, threads: int, alone: int, seconds: float, port: int, out: Path
) -> None:
    torch.set_num_threads(threads)
    become_rank(rank, ranks, port)
    on_gpu = torch.cuda.is_available()
    with open_mesh(ParallelConfig(), None if on_gpu else torch.device("cpu")) as mesh:
        found: dict[str, Any] = {"ranks": ranks, "at": {}, "messages": messages(mesh, seconds)}
        found["at"]["messages"] = measured_at()
        if not on_gpu:
            found["crowd"] = crowd(mesh, threads, alone)
            found["at"]["crowd"] = measured_at()
        if mesh.is_main:
            out.write_text(json.dumps(found))


def become_rank(rank: int, ranks: int, port: int) -> None:
    """Set the environment of rank ``rank`` of ``ranks`` on this machine, like a launcher."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
        **{"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def messages(mesh: Mesh, seconds: float) -> list[dict[str, Any]]:
    """Time a small and a large message of each kind among all ranks."""
    wanted = [
        Message(kind, "hdp", mesh.world_size, size, "float32", per_step=0)
        for kind in KINDS
        for size in (SMALL, LARGE)
    ]
    rounds = [time_messages(mesh, wanted, seconds / TIMES) for _ in range(TIMES)]
    return [
        {
            "kind": message.kind,
            "bytes": message.bytes,
            "bus_bytes": message.bus_bytes,
            "seconds": min(told[index].seconds for told in rounds),
        }
        for index, message in enumerate(wanted)
    ]


def crowd(mesh: Mesh, threads: int, alone: int) -> dict[str, float]:
    """Return each rank's rates when all ranks compute, relative to one rank alone."""
    size = 1024
    left, right = (torch.randn(size, size).bfloat16() for _ in range(2))
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    works: Mapping[str, Callable[[], object]] = {
        "products": lambda: torch.mm(left, right),
        "memory": lambda: target.copy_(source),
    }
    shares: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            mesh.barrier("one rank alone")
            torch.set_num_threads(alone)
            single = _median_seconds(work) if mesh.is_main else 0.0
            torch.set_num_threads(threads)
            mesh.barrier("all ranks at once")
            shares[name].append(single / _median_seconds(work))
    return {name: min(1.0, statistics.median(found)) for name, found in shares.items()}


def _median_seconds(work: Callable[[], object]) -> float:
    """Return median seconds over ``SLICE_S``: CPU time with one thread, else wall time."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[float] = []
    begun = time.perf_counter()
    while not taken or time.perf_counter() - begun < SLICE_S:
        start = now()
        work()
        taken.append(now() - start)
    return statistics.median(taken)
