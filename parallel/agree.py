"""Run slow or fallible work so that all ranks finish it together and see the same result.

Disk operations have no time limit. While a disk operation runs, all ranks call a small all-reduce
every few seconds, so no collective has to wait for a disk. A slow disk is therefore not mistaken
for a dead rank, and a dead rank is detected within ``parallel.timeout_s``.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh

T = TypeVar("T")
HEARTBEAT_S = 5.0
_log = logging.getLogger(__name__)


def heartbeat_s(mesh: Mesh) -> float:
    """Return the seconds between two heartbeats of the ranks, well below the timeout.

    For example, a timeout of 600 s gives 5 s and a timeout of 8 s gives 2 s.
    """
    return min(HEARTBEAT_S, mesh.timeout.total_seconds() / 4)


def wait_for_all(mesh: Mesh, ended: Callable[[float], bool], what: str) -> None:
    """Return once ``ended(seconds)`` is true on every rank; ``ended`` blocks at most ``seconds``.

    Every rank calls this function. The main rank logs a warning every ``parallel.timeout_s`` that
    lists the ranks that have not finished ``what``.
    """
    begun = warned = time.monotonic()
    for meetings in itertools.count():  # noqa: B007 (``trainer/watch`` sees that they go on)
        busy = torch.zeros(mesh.world_size, dtype=torch.int32)
        busy[mesh.rank] = not ended(heartbeat_s(mesh))
        dist.all_reduce(busy, group=mesh.host_group)
        ranks = busy.nonzero().flatten().tolist()
        if not ranks:
            return
        now = time.monotonic()
        if mesh.is_main and now - warned > mesh.timeout.total_seconds():
            warned = now
            _log.warning("rank(s) %s: %s has taken %.0f s so far", ranks, what, now - begun)


def with_heartbeat(mesh: Mesh, work: Callable[[], T], what: str) -> T:
    """Run slow ``work`` in a thread with heartbeats; return its result or raise its error.

    Every rank calls this function, and no rank returns before ``work`` has ended on all ranks.
    ``work`` runs in a thread of its own and must not use ``mesh.host_group``. For example,
    ``with_heartbeat(mesh, lambda: path.read_bytes(), "reading a file")``.
    """
    if mesh.world_size == 1:
        return work()
    outcome: Future[T] = Future()

    def run() -> None:
        if mesh.device.type == "cuda":
            torch.cuda.set_device(mesh.device)  # the current CUDA device is per thread
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon thread: if another rank dies, this process can exit without waiting for its disk.
    threading.Thread(target=run, name=what, daemon=True).start()
    wait_for_all(mesh, lambda seconds: bool(wait([outcome], seconds).done), what)
    return outcome.result()


def on_all_ranks(mesh: Mesh, work: Callable[[], T], what: str) -> T:
    """Run ``work`` on every rank; if any rank fails, raise the first UserError on all ranks."""
    result: list[T] = []
    failure: str | None = None
    try:
        result.append(with_heartbeat(mesh, work, what))
    except UserError as error:
        failure = str(error)
    failures = [text for text in mesh.gather_objects(failure) if text is not None]
    if failures:
        raise UserError(failures[0])
    return result[0]


def on_main_rank(mesh: Mesh, work: Callable[[], T], what: str) -> T | None:
    """Run ``work`` on the main rank only; raise its UserError on all ranks."""
    return on_all_ranks(mesh, lambda: work() if mesh.is_main else None, what)


def from_main_rank(mesh: Mesh, work: Callable[[], T], what: str) -> T:
    """Run ``work`` on the main rank and broadcast its result (must not be None) to all ranks.

    For example, ``from_main_rank(mesh, path.read_text, "reading a file")``.
    """
    result = mesh.broadcast_object(on_main_rank(mesh, work, what))
    assert result is not None
    return result
