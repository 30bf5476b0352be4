"""The mesh: which ranks there are, how they are arranged, and the groups they talk in.

A process that nobody launched gets a group of one, so nothing else has to ask whether it is alone.
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
# meetings in ``host_group`` find ranks that died (parallel/agree.py).
CHECKPOINT_TIMEOUT = timedelta(days=1)

AxisName = Literal["pp", "hdp", "tp", "ep", "edp", "stage"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh, seen from this rank: its place, its length, the group of its ranks."""

    rank: int
    size: int
    group: dist.ProcessGroup

    # As batches of one message: NCCL may make a communicator for two ranks that send singly.

    def send(self, tensor: Tensor, to: int) -> dist.Work:
        """Begin to send; ``tensor`` must stay as it is until the work returned is done."""
        sent = on_wire(tensor.contiguous(), self.group)
        return _batch_of_one(dist.P2POp(dist.isend, sent, group=self.group, group_peer=to))

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill ``tensor`` with what the rank ``source`` of this axis sends."""
        assert tensor.is_contiguous()
        got = on_wire(tensor, self.group)
        _batch_of_one(dist.P2POp(dist.irecv, got, group=self.group, group_peer=source)).wait()
        if got is not tensor:
            tensor.copy_(got)


@dataclass(frozen=True)
class Mesh:
    """All ranks of the run, arranged as (pp, hdp, tp), with the groups they talk in.

    tp is innermost: its ranks talk most, so they are neighbours on a node. ``hdp`` is
    ``replicas`` x ``shard``, and ``shard`` is ``expert_shard`` x ``ep``. ``device_mesh`` has the
    dimensions (pp, replicas, shard, tp); ``expert_mesh`` is the same ranks with shard cut in two,
    or ``device_mesh`` itself without expert parallelism.
    ``edp`` are the ranks that hold the same experts: replicas x expert_shard. ``stage`` is
    hdp x tp: all ranks that hold parts of the same parameters.

    ``communicators`` are the groups of axes with more than one rank, each once: NCCL's alone on
    CUDA, so what travels in them lies on ``device``. ``host_group`` (gloo) carries host objects and
    flags. ``checkpoint_group`` (gloo) belongs to the checkpoint writer alone: it communicates from
    a thread of its own, and two threads in one group cross their collectives. Close the mesh, or
    use it as a context manager, when the run ends; a mesh over a process group that the caller had
    started leaves that one running. ``restart``: what the launcher started this process again for.
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
    _closes: tuple[dist.ProcessGroup | None, ...] = field(repr=False)  # None: all there are
    restart: Restart | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def axis(self, name: AxisName) -> Axis:
        """Return the axis called ``name``."""
        axis: Axis = getattr(self, name)
        return axis

    @property
    def zero_mesh(self) -> DeviceMesh:
        """What ZeRO shards over: [shard], or [replicas, shard] where there are several copies."""
        return self.device_mesh[self._zero_dims("shard")]

    @property
    def expert_zero_mesh(self) -> DeviceMesh:
        """The same for experts: [expert_shard] or [replicas, expert_shard]."""
        return self.expert_mesh[self._zero_dims("expert_shard" if self.ep.size > 1 else "shard")]

    def _zero_dims(self, shard: str) -> str | tuple[str, ...]:
        return shard if self.device_mesh["replicas"].size() == 1 else ("replicas", shard)

    def all_reduce_sum(self, tensor: Tensor, axis: AxisName) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks of ``axis``; return it. Same on all."""
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
        """Return what rank ``source`` passed, on every rank (pickled, over the host group)."""
        held = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(held, src=source, group=self.host_group)
        return held[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return what all ranks passed, in rank order, on every rank."""
        gathered: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def all_equal(self, number: int) -> bool:
        """Return, on every rank, whether all ranks passed the same number (below 2**62)."""
        if self.world_size == 1:
            return True
        bounds = torch.tensor([number, -number])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self.host_group)
        return int(bounds[0]) == -int(bounds[1])

    def barrier(self, reason: str) -> None:
        """Wait for all ranks; if some do not come within the timeout, say which, before what."""
        if self.world_size == 1:
            return
        # Over the store: in a group, only ranks that are there can say who is not, and to hear of
        # all others a rank would need a connection to each.
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
        """Leave the groups that ``open_mesh`` made. A second call does nothing."""
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
        # With messages under way that other ranks never answer, leaving a group can block, and the
        # error would not be seen. What all ranks agree on is a UserError.
        agreed = isinstance(error, UserError) and not isinstance(error, RankError)
        if error is None or agreed or self.world_size == 1:
            self.close()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; all of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _batch_of_one(message: dist.P2POp) -> dist.Work:
    (work,) = dist.batch_isend_irecv([message])
    return work


def open_mesh(
    parallel: ParallelConfig, device: torch.device | None = None, *, watched: bool = False
) -> Mesh:
    """Start the process groups of this run, or use the one the caller has started.

    ``device`` None: this rank's GPU, or the CPU on a machine without one. ``watched``: groups give
    up after ``trainer/watch`` does. Every rank calls this with the same ``parallel``. Raises
    UserError, before any group is started, where the degrees do not fit the number of ranks, the
    device is not there or the launch is half described.
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
    """Let a group of the mesh end what hangs when the run says so; torch gives it its default."""
    if dist.get_backend(group) != "fake":
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def _forget_shardings() -> None:
    """Drop what DTensor remembers of shardings.

    Its caches know a mesh by its shape, so an equal mesh that is opened later in the process would
    be handed the groups of this one, which are gone; and they keep these groups' threads alive.
    """
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    # Private names, of which older versions of torch have not all.
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
