"""Process groups: one for each set of ranks that talk, made in as many calls as there are axes.

Every rank makes the same calls in the same order, one for each axis, whatever the number of ranks.
On CUDA the groups of axes are NCCL's alone, split off a communicator of all ranks that is bound to
this rank's device, which needs no store and no sockets of gloo. Elsewhere the members of a group
meet through the store. Axes of the same ranks share a group, and so do all axes of one rank.

Host objects and checkpoints have a gloo group each, over all ranks. Their ranks connect when they
first talk: a rank holds sockets to the few that it meets in rings and trees, not to all.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from allometry.scaling.degrees import Degrees

AXES: Mapping[str, tuple[str, ...]] = {
    "pp": ("pp",),
    "hdp": ("replicas", "expert_shard", "ep"),
    "tp": ("tp",),
    "ep": ("ep",),
    "edp": ("replicas", "expert_shard"),
    "stage": ("replicas", "expert_shard", "ep", "tp"),
    "replicas": ("replicas",),
    "shard": ("expert_shard", "ep"),
    "expert_shard": ("expert_shard",),
}
"""Each axis as dimensions of the grid of all ranks, in the order in which groups are made."""

POINT_TO_POINT = frozenset({"pp", "hdp"})
"""Axes whose ranks send to single others: stages of a pipeline, members of a ring."""

LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"


@dataclass(frozen=True)
class Communicator:
    """A group of this rank with others; ``axes`` are the names of all axes that use it."""

    axes: tuple[str, ...]
    group: dist.ProcessGroup

    @property
    def point_to_point(self) -> bool:
        """Whether its ranks also send to single others."""
        return not POINT_TO_POINT.isdisjoint(self.axes)


@dataclass(frozen=True)
class Groups:
    """This rank's groups.

    ``of``: the group of each axis. ``communicators``: those of more than one rank, each once, in
    the same order on all ranks. ``made``: what must be destroyed; the group of all ranks, which an
    axis may use, is not among them.
    """

    of: Mapping[str, dist.ProcessGroup]
    communicators: tuple[Communicator, ...]
    host: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
    made: tuple[dist.ProcessGroup, ...]


def grid_of(degrees: Degrees) -> dict[str, int]:
    """Return the dimensions of the grid of all ranks, outermost first, and their sizes."""
    return {
        "pp": degrees.pp,
        "replicas": degrees.replicas,
        "expert_shard": degrees.shard // degrees.ep,
        "ep": degrees.ep,
        "tp": degrees.tp,
    }


def parts_of(grid: Mapping[str, int], dims: Collection[str]) -> np.ndarray:
    """Return the groups of ranks that differ in ``dims`` alone: [groups, ranks], each ascending."""
    names = list(grid)
    inner = [i for i, name in enumerate(names) if name in dims]
    outer = [i for i, name in enumerate(names) if name not in dims]
    size = math.prod(grid[names[i]] for i in inner)
    ranks = np.arange(math.prod(grid.values())).reshape(list(grid.values()))
    return ranks.transpose(outer + inner).reshape(-1, size)


def open_groups(
    grid: Mapping[str, int], device: torch.device, timeout: timedelta, checkpoint_timeout: timedelta
) -> Groups:
    """Make this rank's groups; all ranks call this alike, once the group of all is there."""
    # A simulated world has no other ranks that gloo could meet.
    host_backend = "fake" if dist.get_backend() == "fake" else "gloo"
    with _connected_when_needed():
        host, checkpoint = (
            dist.new_group(backend=host_backend, timeout=limit, group_desc=what)
            for what, limit in (
                ("host objects", timeout),
                ("checkpoint writer", checkpoint_timeout),
            )
        )
    everyone = dist.group.WORLD
    assert everyone is not None
    # torch numbers the groups that all ranks make, so this name is new, whatever was closed before.
    prefix = host.group_name
    long = frozenset(name for name, size in grid.items() if size > 1)
    by_dims: dict[frozenset[str], dist.ProcessGroup] = {long: everyone}
    of: dict[str, dist.ProcessGroup] = {}
    for axis, dims in AXES.items():
        key = long.intersection(dims)
        if key not in by_dims:
            name = axis if key else "alone"
            by_dims[key] = _make(parts_of(grid, key), f"{prefix}/{name}", device, timeout)
        of[axis] = by_dims[key]
    communicators = tuple(
        Communicator(tuple(axis for axis in AXES if of[axis] is group), group)
        for key, group in by_dims.items()
        if key and group in of.values()
    )
    made = (host, checkpoint, *(group for group in by_dims.values() if group is not everyone))
    return Groups(of, communicators, host, checkpoint, made)


def _make(
    parts: np.ndarray, name: str, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    """Make the group of this rank's row of ``parts``; every rank makes that of its own."""
    everyone = dist.group.WORLD
    assert everyone is not None
    if everyone.bound_device_id is not None:
        group = dist.split_group(
            split_ranks=parts.tolist(), timeout=timeout, group_desc=name
        )  # one ncclCommSplit, which all ranks take part in
        assert group is not None, (name, parts.shape)
        return group
    rank = dist.get_rank()
    row = int(np.flatnonzero((parts == rank).any(axis=1))[0])
    ranks = parts[row].tolist()
    backends = dict(each.split(":") for each in dist.get_backend_config().split(","))
    # What ``new_group`` does, which would name the group after its ranks and the number of groups:
    # one that was closed and is made again would find the addresses of the old one in the store.
    c10d = dist.distributed_c10d
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        ranks.index(rank),
        ranks,
        dist.Backend(backends[device.type]),
        c10d._get_default_store(),
        f"{name}/{row}",
        timeout=timeout,
        group_desc=name,
    )
    c10d._world.pg_group_ranks[group] = {of_all: i for i, of_all in enumerate(ranks)}
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def _connected_when_needed() -> Iterator[None]:
    """Let groups of gloo that are made here connect two ranks when they first talk.

    torch takes no argument for it. What a user has set stands.
    """
    ours = LAZY_GLOO not in os.environ
    if ours:
        os.environ[LAZY_GLOO] = "1"
    try:
        yield
    finally:
        if ours:
            del os.environ[LAZY_GLOO]


def allow_sockets(world_size: int) -> None:
    """Raise the number of files that this process may open, as far as it is allowed.

    The main rank may talk to every other one, in two groups; most systems start with 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * world_size
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def device_meshes(
    grid: Mapping[str, int], groups: Groups, device_type: str
) -> tuple[DeviceMesh, DeviceMesh]:
    """Return (pp, replicas, shard, tp), and the same ranks with shard cut in expert_shard and ep.

    Without expert parallelism both are one.
    """
    names = ("pp", "replicas", "shard", "tp")
    sizes = [grid["pp"], grid["replicas"], grid["expert_shard"] * grid["ep"], grid["tp"]]
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    # Made without groups, and then given them as ``DeviceMesh.from_group`` does: torch would make a
    # group for each set of ranks, in one call after the other on every rank.
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False)
    experts = mesh
    if grid["ep"] > 1:
        # Unflattened rather than made anew: FSDP2 wants its mesh and that of the parameter it
        # shards to descend from one.
        parts = {name: grid[name] for name in ("expert_shard", "ep")}
        experts = mesh._unflatten(2, tuple(parts.values()), tuple(parts))
    for each in (mesh, experts):
        own = [groups.of[name] for name in each.mesh_dim_names or ()]
        each._dim_group_names = [group.group_name for group in own]
        mesh._pg_registry.update({group.group_name: group for group in own})
    return mesh, experts


def warm_up(communicators: Iterable[Communicator], device: torch.device) -> None:
    """Connect the ranks of each communicator, one communicator after the other.

    All ranks call this before anything else is sent. NCCL connects ranks when they first talk, and
    a communicator that only a part of its ranks has come to so far hangs: the first message of a
    ring or between two stages would be one. Ranks that send to single others do so here with both
    neighbours: in a pipeline all that stages, and the ends of a tied model, ever talk to.
    """
    for each in communicators:
        if dist.get_backend(each.group) == "fake":
            continue
        dist.all_reduce(torch.zeros(1, device=device), group=each.group)
        # gloo sends what lies in the host's memory alone.
        if each.point_to_point and (device.type == "cpu" or dist.get_backend(each.group) == "nccl"):
            _greet_neighbours(each.group, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _greet_neighbours(group: dist.ProcessGroup, device: torch.device) -> None:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sent_2, received_2 = torch.zeros(2, 2, device=device)
    messages = []
    for way, step in enumerate((1, -1)):
        to, source = (rank + step) % size, (rank - step) % size
        messages += [
            dist.P2POp(dist.isend, sent_2[way], group=group, group_peer=to),
            dist.P2POp(dist.irecv, received_2[way], group=group, group_peer=source),
        ]
    for work in dist.batch_isend_irecv(messages):
        work.wait()
