"""Device mesh: the ranks of a run, their arrangement in axes, and the process groups of the axes.

A process without a launcher gets a group of one rank, so other code needs no special case for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from allometry.configs.errors import RankError, UserError
from allometry.configs.execution import ParallelConfig
from allometry.parallel.groups import (
    Communicator,
    device_meshes,
    grid_of,
    open_groups,
    warm_up,
)
from allometry.parallel.rendezvous import Launch, Restart, on_loopback, start, this_launch
from allometry.parallel.wire import on_wire
from allometry.scaling.degrees import resolve_degrees

T = TypeVar("T")
# Ranks that write or read a checkpoint wait for the slowest disk, not for ``parallel.timeout_s``;
# heartbeats in ``host_group`` detect dead ranks (parallel/agree.py).
CHECKPOINT_TIMEOUT = timedelta(days=1)

AxisName = Literal["pp", "hdp", "tp", "ep", "edp", "stage"]


@dataclass(frozen=True, slots=True)
class Axis:
    """Axis of the mesh as seen by this rank: index of the rank, number of ranks, process group."""

    rank: int
    size: int
    group: dist.ProcessGroup

    # Batches of one message: for single sends NCCL may create a communicator for each pair of
    # ranks.

    def send(self, tensor: Tensor, to: int) -> dist.Work:
        """Start to send ``tensor``, which must not change until the returned work has completed."""
        sent = on_wire(tensor.contiguous(), self.group)
        return _batch_of_one(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))

    def receive(self, tensor: Tensor, source: int) -> None:
        """Receive ``tensor`` from the rank ``source`` of this axis."""
        assert tensor.is_contiguous()
        got = on_wire(tensor, self.group)
        _batch_of_one(dist.P2POp(dist.irecv, got, group=self.group, group_peer=source)).wait()
        if got is not tensor:
            tensor.copy_(got)


@dataclass(frozen=True)
class Mesh:
    """All ranks of the run, arranged as (pp, hdp, tp), with their process groups.

    tp is innermost: tp ranks communicate most, so they are neighbours on a node. ``hdp`` is
    ``replicas`` x ``shard``, and ``shard`` is ``expert_shard`` x ``ep``. ``device_mesh`` has the
    dimensions (pp, replicas, shard, tp); ``expert_mesh`` has the same ranks with shard split in
    two, and is ``device_mesh`` without expert parallelism. For example, 8 ranks with pp = 2 and tp
    = 2 have hdp = 2.

    ``edp`` are the ranks with the same experts: replicas x expert_shard. ``stage`` is hdp x tp: all
    ranks with shards of the same parameters.

    ``communicators`` are the groups of axes with more than one rank, each once: NCCL only on CUDA,
    so their tensors must be on ``device``. ``host_group`` (gloo) transfers host objects and flags.
    ``checkpoint_group`` (gloo) is reserved for the checkpoint writer: its thread communicates
    concurrently, and two threads in one group would interleave their collectives. Close the mesh,
    or use it as a context manager, when the run ends; a process group that the caller started stays
    open. ``restart``: number of restarts by the launcher and the last reason; None on the first
    start.
    """

    device: torch.device
    rank: int
    world_size: int
    device_mesh: DeviceMesh
    expert_mesh: DeviceMesh
    pp: Axis
    hdp: Axis
    tp: Axis
    ep: Axis
    edp: Axis
    stage: Axis
    communicators: tuple[Communicator, ...]
    host_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    timeout: timedelta
    _closes: tuple[dist.ProcessGroup | None, ...] = field(repr=False)  # None: all groups
    restart: Restart | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes shared files and logs (rank 0)."""
        return self.rank == 0

    def axis(self, name: AxisName) -> Axis:
        """Return the axis called ``name``."""
        axis: Axis = getattr(self, name)
        return axis

    @property
    def zero_mesh(self) -> DeviceMesh:
        """Mesh for ZeRO shards: [shard], or [replicas, shard] with more than one replica."""
        return self.device_mesh[self._zero_dims("shard")]

    @property
    def expert_zero_mesh(self) -> DeviceMesh:
        """Mesh for ZeRO shards of experts: [expert_shard] or [replicas, expert_shard]."""
        return self.expert_mesh[self._zero_dims("expert_shard" if self.ep.size > 1 else "shard")]

    def _zero_dims(self, shard: str) -> str | tuple[str, ...]:
        return shard if self.device_mesh["replicas"].size() == 1 else ("replicas", shard)

    def all_reduce_sum(self, tensor: Tensor, axis: AxisName) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks of ``axis`` and return it; a collective."""
        along = self.axis(axis)
        if along.size > 1:
            dist.all_reduce(tensor, group=along.group)
        return tensor

    def sum_together(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their sums over all ranks, in one message."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.flatten().to(self.device) for tensor in tensors])
        dist.all_reduce(flat, group=self.stage.group if self.pp.size == 1 else dist.group.WORLD)
        for tensor, part in zip(
            tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the value of rank ``source`` on every rank (pickled, over the host group)."""
        held = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(held, src=source, group=self.host_group)
        return held[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank.

        For example, ``mesh.gather_objects(mesh.rank)`` is [0, 1, ...].
        """
        gathered: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def all_equal(self, number: int) -> bool:
        """Return True on every rank if all ranks passed the same number (below 2**62)."""
        if self.world_size == 1:
            return True
        bounds = torch.tensor([number, -number])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.host_group)
        return int(bounds[0]) == -int(bounds[1])

    def barrier(self, reason: str) -> None:
        """Wait for all ranks; after the timeout raise RuntimeError that names absent ranks."""
        if self.world_size == 1:
            return
        # Over the store: a group cannot name the ranks that are absent, and to receive from all
        # others a rank would need a connection to each.
        store = dist.distributed_c10d._get_default_store()
        place = f"{self.host_group.group_name}/barrier"
        meeting, last = divmod(store.add(f"{place}/came", 1) - 1, self.world_size)
        here = f"{place}/{meeting}"
        store.set(f"{here}/{self.rank}", "")
        if last == self.world_size - 1:
            store.set(f"{here}/all", "")
        try:
            store.wait([f"{here}/all"], self.timeout)
        except RuntimeError as error:
            absent = [r for r in range(self.world_size) if not store.check([f"{here}/{r}"])]
            raise RuntimeError(
                f"not all ranks are ready for {reason}: rank(s) {absent} did not come within "
                f"{self.timeout.total_seconds():.0f} s"
            ) from error

    def close(self) -> None:
        """Destroy the groups that ``open_mesh`` created. A second call has no effect."""
        if dist.is_initialized():
            for group in self._closes:
                dist.destroy_process_group(group)
            object.__setattr__(self, "_closes", ())
            _forget_shardings()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # With messages in flight that other ranks never answer, destroying a group can block and
        # hide the error. A UserError is raised on all ranks, so the groups can be destroyed.
        agreed = isinstance(error, UserError) and not isinstance(error, RankError)
        if error is None or agreed or self.world_size == 1:
            self.close()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, or any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _batch_of_one(message: dist.P2POp) -> dist.Work:
    (work,) = dist.batch_isend_irecv([message])
    return work


def open_mesh(
    parallel: ParallelConfig, device: torch.device | None = None, *, watched: bool = False
) -> Mesh:
    """Start the process groups of this run, or use the group that the caller has started.

    ``device`` None: this rank's GPU, or the CPU on a machine without one. ``watched``: the timeout
    of the groups is longer than the timeout of ``trainer/watch``. Every rank calls this function
    with the same ``parallel``. Raises UserError, before any group is started, if the degrees do not
    match the number of ranks, the device is missing or the launcher's variables are incomplete.

    For example::

        with open_mesh(config.parallel) as mesh:
            mesh.all_reduce_sum(loss, "hdp")
    """
    ours = not dist.is_initialized()
    launch = this_launch()
    degrees = resolve_degrees(parallel, launch.world_size)
    device = _choose_device(device, launch)
    timeout = patience = timedelta(seconds=parallel.timeout_s)
    if watched:
        patience = timedelta(seconds=parallel.watch.patience_s(parallel.timeout_s))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    grid = grid_of(degrees)
    with on_loopback(launch):
        restart = start(launch, device, patience) if ours else None
        groups = open_groups(grid, device, patience, max(patience, CHECKPOINT_TIMEOUT))
    everyone = dist.group.WORLD
    assert everyone is not None
    _set_timeout(everyone, patience)
    warm_up(groups.communicators, device)
    device_mesh, expert_mesh = device_meshes(grid, groups, device.type)
    names: tuple[AxisName, ...] = get_args(AxisName)
    axes = {
        name: Axis(dist.get_rank(group), dist.get_world_size(group), group)
        for name, group in ((name, groups.of[name]) for name in names)
    }
    return Mesh(
        device=device,
        rank=launch.rank,
        world_size=launch.world_size,
        device_mesh=device_mesh,
        expert_mesh=expert_mesh,
        **axes,
        communicators=groups.communicators,
        host_group=groups.host,
        checkpoint_group=groups.checkpoint,
        timeout=timeout,
        _closes=(None,) if ours else groups.made,
        restart=restart,
    )


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set the timeout of a group; torch would use its default."""
    if dist.get_backend(group) != "fake":
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _forget_shardings() -> None:
    """Clear DTensor's caches of shardings.

    The caches identify a mesh by its shape. An equal mesh opened later in the process would receive
    the destroyed groups of this mesh, and the caches keep the threads of these groups alive.
    """
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    # Private names, some of which older versions of torch lack.
    for module, name in (
        (debug, "_clear_sharding_prop_cache"),
        (_redistribute, "clear_redistribute_planner_cache"),
    ):
        getattr(module, name, lambda: None)()
    costs = getattr(_collective_utils, "MeshTopoInfo", None)
    for owner in (_redistribute, costs):
        for name in dir(owner):
            getattr(getattr(owner, name), "cache_clear", lambda: None)()


def _choose_device(device: torch.device | None, launch: Launch) -> torch.device:
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return device
    index = launch.local_rank if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"rank {launch.rank} (LOCAL_RANK={launch.local_rank}) wants GPU {index}, but this "
            f"machine shows {count}; start at most {count} ranks on it (torchrun --nproc-per-node) "
            "or train on the CPU"
        )
    return torch.device("cuda", index)
