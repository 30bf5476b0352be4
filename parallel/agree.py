"""Work that one rank does for all, or that can fail on one: every rank ends it alike.

Work on disks takes as long as they take. While it lasts, ranks meet every few seconds, so that no
collective waits for a disk: a slow disk is not taken for a dead rank, and a rank that died is found
within ``parallel.timeout_s``.
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
    """Seconds between two meetings of ranks: well below the timeout."""
    return min(HEARTBEAT_S, mesh.timeout.total_seconds() / 4)


def wait_for_all(mesh: Mesh, ended: Callable[[float], bool], what: str) -> None:
    """Return once ``ended(seconds)``, which waits at most so long, is true on every rank.

    Every rank calls this. The main rank warns every ``parallel.timeout_s`` of the ranks that are
    still at ``what``.
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
    """Do slow ``work`` beside the meetings of ranks; return its result or raise its error.

    Every rank calls this, and none returns before the work of all has ended. ``work`` runs in a
    thread and must not use ``mesh.host_group``.
    """
    if mesh.world_size == 1:
        return work()
    outcome: Future[T] = Future()

    def run() -> None:
        if mesh.device.type == "cuda":
            torch.cuda.set_device(mesh.device)  # each thread has its own
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # A daemon: should another rank die, this process does not wait for its disk to end.
    threading.Thread(target=run, name=what, daemon=True).start()
    wait_for_all(mesh, lambda seconds: bool(wait([outcome], seconds).done), what)
    return outcome.result()


def on_all_ranks(mesh: Mesh, work: Callable[[], T], what: str) -> T:
    """Do ``work`` on every rank; if any rank cannot, all raise the first one's UserError."""
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
    """Do ``work`` on the main rank; its UserError is raised on all ranks."""
    return on_all_ranks(mesh, lambda: work() if mesh.is_main else None, what)


def from_main_rank(mesh: Mesh, work: Callable[[], T], what: str) -> T:
    """Do ``work`` on the main rank and hand its result, which is not None, to all ranks."""
    result = mesh.broadcast_object(on_main_rank(mesh, work, what))
    assert result is not None
    return result
