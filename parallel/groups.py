"""Process groups: one for each set of communicating ranks, created with one call for each axis.

Every rank makes the same calls in the same order, one for each axis, for any number of ranks. On
CUDA the groups of axes are NCCL only and are split from the communicator of all ranks, which is
bound to this rank's device; splitting needs neither the store nor gloo sockets. On other devices
the members of a group connect through the store. Axes with the same ranks share a group, and all
axes of size one share a group.

Host objects and checkpoints have a gloo group each, over all ranks. Their ranks connect at the
first message, so a rank opens sockets only to its neighbours in rings and trees rather than to all
ranks.
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
"""Dimensions of the rank grid that each axis covers, in the order in which groups are created."""

POINT_TO_POINT = frozenset({"pp", "hdp"})
"""Axes with point-to-point messages: stages of a pipeline, members of a ring."""

LAZY_GLOO = "TORCH_GLOO_LAZY_INIT"


@dataclass(frozen=True)
class Communicator:
    """A process group of several ranks; ``axes`` are the names of all axes that use the group."""

    axes: tuple[str, ...]
    group: dist.ProcessGroup

    @property
    def point_to_point(self) -> bool:
        """True if the ranks of the group also send point-to-point messages."""
        return not POINT_TO_POINT.isdisjoint(self.axes)


@dataclass(frozen=True)
class Groups:
    """Process groups of this rank.

    ``of``: the group of each axis. ``communicators``: the groups with more than one rank, each
    once, in the same order on all ranks. ``made``: the groups to destroy; the default group, which
    an axis may use, is not included.
    """

    of: Mapping[str, dist.ProcessGroup]
    communicators: tuple[Communicator, ...]
    host: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
    made: tuple[dist.ProcessGroup, ...]


def grid_of(degrees: Degrees) -> dict[str, int]:
    """Return the sizes of the dimensions of the rank grid, outermost first.

    For example, hdp = 4 with ep = 2, and tp = 2, give expert_shard = 2, ep = 2 and tp = 2.
    """
    return {
        "pp": degrees.pp,
        "replicas": degrees.replicas,
        "expert_shard": degrees.shard // degrees.ep,
        "ep": degrees.ep,
        "tp": degrees.tp,
    }


def parts_of(grid: Mapping[str, int], dims: Collection[str]) -> np.ndarray:
    """Return the groups of ranks that differ only in ``dims``: [groups, ranks], ascending.

    For example, the dim "tp" of the grid {"hdp": 2, "tp": 2} gives [[0, 1], [2, 3]].
    """
    names = list(grid)
    inner = [i for i, name in enumerate(names) if name in dims]
    outer = [i for i, name in enumerate(names) if name not in dims]
    size = math.prod(grid[names[i]] for i in inner)
    ranks = np.arange(math.prod(grid.values())).reshape(list(grid.values()))
    return ranks.transpose(outer + inner).reshape(-1, size)


def open_groups(
    grid: Mapping[str, int], device: torch.device, timeout: timedelta, checkpoint_timeout: timedelta
) -> Groups:
    """Create this rank's groups; all ranks call this function, after the default group's start."""
    # A simulated world has no other ranks for gloo to connect to.
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
    # torch numbers the groups that all ranks create, so this name is unique even after groups were
    # closed.
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
    """Create the group of this rank's row of ``parts``; every rank creates its own group."""
    everyone = dist.group.WORLD
    assert everyone is not None
    if everyone.bound_device_id is not None:
        group = dist.split_group(
            split_ranks=parts.tolist(), timeout=timeout, group_desc=name
        )  # one ncclCommSplit, a collective of all ranks
        assert group is not None, (name, parts.shape)
        return group
    rank = dist.get_rank()
    row = int(np.flatnonzero((parts == rank).any(axis=1))[0])
    ranks = parts[row].tolist()
    backends = dict(each.split(":") for each in dist.get_backend_config().split(","))
    # The steps of ``new_group``, which would name the group after its ranks and the number of
    # groups: a group that is closed and created again would then find the old group's addresses in
    # the store.
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
    """Create gloo groups that connect two ranks at their first message.

    torch has no argument for lazy connections, only an environment variable. A value set by the
    user is kept.
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
    """Raise the limit of open files of this process, up to the hard limit.

    The main rank may connect to every other rank in two groups; most systems start with a limit of
    1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * world_size
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def device_meshes(
    grid: Mapping[str, int], groups: Groups, device_type: str
) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the mesh (pp, replicas, shard, tp), and the mesh with shard split in two.

    The second mesh has the dimensions expert_shard and ep in place of shard. Without expert
    parallelism both meshes are the same object.
    """
    names = ("pp", "replicas", "shard", "tp")
    sizes = [grid["pp"], grid["replicas"], grid["expert_shard"] * grid["ep"], grid["tp"]]
    ranks = torch.arange(math.prod(sizes)).view(sizes)
    # The meshes are created without groups and then receive groups as in ``DeviceMesh.from_group``.
    # torch would create one group for each set of ranks, one call after the other on every rank.
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=names, _init_backend=False)
    experts = mesh
    if grid["ep"] > 1:
        # Unflattened rather than created: FSDP2 requires that its mesh and the mesh of a parameter
        # have the same root mesh.
        parts = {name: grid[name] for name in ("expert_shard", "ep")}
        experts = mesh._unflatten(2, tuple(parts.values()), tuple(parts))
    for each in (mesh, experts):
        own = [groups.of[name] for name in each.mesh_dim_names or ()]
        each._dim_group_names = [group.group_name for group in own]
        mesh._pg_registry.update({group.group_name: group for group in own})
    return mesh, experts


def warm_up(communicators: Iterable[Communicator], device: torch.device) -> None:
    """Connect the ranks of each communicator, one communicator after the other.

    All ranks call this function before any other message. NCCL connects ranks at their first
    message and hangs if only a part of the ranks has reached a communicator; the first message of a
    ring or between two stages would do that. Ranks with point-to-point messages exchange messages
    with both neighbours: in a pipeline these are all pairs that communicate, including the two ends
    of a tied model.
    """
    for each in communicators:
        if dist.get_backend(each.group) == "fake":
            continue
        dist.all_reduce(torch.zeros(1, device=device), group=each.group)
        # gloo sends only from host memory.
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
