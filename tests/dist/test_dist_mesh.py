"""The mesh over several ranks."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.parallel.mesh import open_mesh

RunRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")


def use_a_started_group() -> dict[str, Any]:
    mesh = open_mesh(ParallelConfig(timeout_s=30), CPU)
    facts = {
        "rank": (mesh.rank, mesh.hdp.rank, mesh.pp.rank, mesh.tp.rank),
        "size": (mesh.world_size, mesh.hdp.size, mesh.pp.size, mesh.tp.size),
        "main": mesh.is_main,
        "sum": float(mesh.all_reduce_sum(torch.tensor(float(mesh.rank + 1)), "hdp")),
        "alone": float(mesh.all_reduce_sum(torch.tensor(float(mesh.rank + 1)), "tp")),
        "told": mesh.broadcast_object({"from": mesh.rank}, source=1),
        "gathered": mesh.gather_objects(f"rank {mesh.rank}"),
        "equal": (mesh.all_equal(2**55 + 1), mesh.all_equal(2**55 + mesh.rank)),
        "groups": len({id(g) for g in (dist.group.WORLD, mesh.host_group, mesh.checkpoint_group)}),
    }
    for _ in range(3):
        mesh.barrier("the end of the test")
    mesh.close()
    mesh.close()
    dist.barrier()  # the caller's group still works
    return facts


def test_axes_and_helpers(run_ranks: RunRanks) -> None:
    for rank, facts in enumerate(run_ranks(use_a_started_group, 4)):
        assert facts == {
            "rank": (rank, rank, 0, 0),
            "size": (4, 4, 1, 1),
            "main": rank == 0,
            "sum": 10.0,
            "alone": rank + 1.0,
            "told": {"from": 1},
            "gathered": ["rank 0", "rank 1", "rank 2", "rank 3"],
            "equal": (True, False),
            "groups": 3,
        }


@contextmanager
def environment(port: int) -> Iterator[None]:
    """Set the variables that torchrun sets and the harness does not."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        yield
    finally:
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


def start_as_torchrun_would(port: int) -> float:
    with environment(port), open_mesh(ParallelConfig(hdp=2, timeout_s=30), CPU) as mesh:
        total = float(mesh.all_reduce_sum(torch.ones(()), "hdp"))
    assert not dist.is_initialized()
    return total


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_groups_start_from_the_environment_and_end(run_ranks: RunRanks) -> None:
    assert run_ranks(start_as_torchrun_would, 2, free_port(), start_group=False) == [2.0, 2.0]


def wrong_degrees() -> str:
    with environment(port=1), pytest.raises(UserError) as caught:
        open_mesh(ParallelConfig(hdp=3), CPU)
    assert not dist.is_initialized(), "no group may start for a layout that cannot be"
    return str(caught.value)


def test_degrees_are_checked_before_any_group_starts(run_ranks: RunRanks) -> None:
    for sentence in run_ranks(wrong_degrees, 2, start_group=False):
        assert sentence.startswith(
            "parallel.hdp=3 (with pp=1 and tp=1) needs 3 ranks, but there are 2"
        )


def barrier_without_rank_1() -> str:
    mesh = open_mesh(ParallelConfig(timeout_s=2), CPU)
    if mesh.rank == 1:
        dist.monitored_barrier(timeout=timedelta(seconds=30))
        return ""
    with pytest.raises(RuntimeError) as caught:
        mesh.barrier("the first checkpoint")
    dist.monitored_barrier(timeout=timedelta(seconds=30))
    return str(caught.value)


def test_a_barrier_names_who_is_missing(run_ranks: RunRanks) -> None:
    sentence, _ = run_ranks(barrier_without_rank_1, 2)
    assert sentence == (
        "not all ranks are ready for the first checkpoint: rank(s) [1] did not come within 2 s"
    )


def sockets() -> int:
    held = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            held += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return held


def sockets_of_a_mesh() -> tuple[int, int, int]:
    """Count sockets added by a mesh with one axis, and by one of gloo's own groups."""
    dist.barrier()  # connects the existing group
    before = sockets()
    mesh = open_mesh(ParallelConfig(timeout_s=30), CPU)
    added = sockets() - before
    dist.barrier()  # of the existing group: a faster rank would connect to this one
    mesh.gather_objects(mesh.rank)
    used = sockets() - before
    eager = dist.new_group(backend="gloo")
    theirs = sockets() - before - used
    dist.destroy_process_group(eager)
    mesh.close()
    return added, used, theirs


def test_host_groups_connect_when_ranks_talk(run_ranks: RunRanks) -> None:
    for added, used, theirs in run_ranks(sockets_of_a_mesh, 4):
        assert theirs >= 3, "one for each other rank"
        # With gloo's usual connections, the host's two groups and a one-rank group would need more
        # than twice as many sockets.
        assert added < 2 * theirs
        assert added < used


def open_and_close(times: int) -> list[float]:
    """Open and close meshes in turn over one store, which keeps entries of earlier groups."""
    sums = []
    for _ in range(times):
        with open_mesh(ParallelConfig(pp=2, tp=2, timeout_s=30), CPU) as mesh:
            each = [mesh.all_reduce_sum(torch.ones(()), axis) for axis in ("pp", "tp", "stage")]
            sums.append(float(torch.stack(each).sum()))
            assert mesh.gather_objects(mesh.rank) == [0, 1, 2, 3]
    return sums


def test_a_mesh_may_be_opened_again_over_one_store(run_ranks: RunRanks) -> None:
    assert run_ranks(open_and_close, 4, 4) == [[6.0] * 4] * 4
