"""The mesh: which ranks there are, how they are arranged, and the groups they talk in.

The only file that reads RANK and its kin, and the only one that starts a process group. A process
that nobody launched gets a group of one, so nothing else has to ask whether it is alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from allometry.configs.errors import UserError
from allometry.configs.execution import ParallelConfig
from allometry.scaling.degrees import Degrees, resolve_degrees

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


@dataclass(frozen=True)
class Mesh:
    """All ranks of the run, arranged as (pp, hdp, tp), with the groups they talk in.

    tp is innermost: its ranks talk most, so they are neighbours on a node. ``hdp`` is
    ``replicas`` x ``shard``, and ``shard`` is ``expert_shard`` x ``ep``. ``device_mesh`` has the
    dimensions (pp, replicas, shard, tp); ``expert_mesh`` is the same ranks with shard cut in two,
    or ``device_mesh`` itself without expert parallelism.
    ``edp`` are the ranks that hold the same experts: replicas x expert_shard. ``stage`` is
    hdp x tp: all ranks that hold parts of the same parameters.

    ``host_group`` (gloo) carries host objects and flags. ``checkpoint_group`` (gloo) belongs to
    the checkpoint writer alone: it communicates from a thread of its own, and two threads in one
    group cross their collectives. Close the mesh, or use it as a context manager, when the run
    ends; a mesh over a process group that the caller had started leaves that one running.
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
    host_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    timeout: timedelta
    _closes: tuple[dist.ProcessGroup | None, ...] = field(repr=False)  # None: all there are

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
        flat = torch.cat([tensor.flatten() for tensor in tensors])
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
        try:
            # Without being told, this collective does not take the timeout of its group.
            dist.monitored_barrier(self.host_group, self.timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(f"not all ranks are ready for {reason}: {error}") from error

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
        if error is None or isinstance(error, UserError) or self.world_size == 1:
            self.close()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which shares its memory; all of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def open_mesh(parallel: ParallelConfig, device: torch.device | None = None) -> Mesh:
    """Start the process groups of this run, or use the one the caller has started.

    ``device`` None: this rank's GPU, or the CPU on a machine without one. Every rank calls this
    with the same ``parallel``. Raises UserError, before any group is started, where the degrees do
    not fit the number of ranks, the device is not there or the launch is half described.
    """
    ours = not dist.is_initialized()
    if ours:
        launch = read_launch(os.environ)
    else:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        launch = Launch(dist.get_rank(), dist.get_world_size(), local_rank, address=None)
    degrees = resolve_degrees(parallel, launch.world_size)
    device = _choose_device(device, launch)
    timeout = timedelta(seconds=parallel.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ours:
        _start(launch, device, timeout)
    device_mesh, expert_mesh, axes = _arrange(degrees, device.type)
    # A simulated world has no other ranks that gloo could meet.
    host_backend = "fake" if dist.get_backend() == "fake" else "gloo"
    host, checkpoint = (
        dist.new_group(backend=host_backend, timeout=limit, group_desc=what)
        for what, limit in (
            ("host objects", timeout),
            ("checkpoint writer", max(timeout, CHECKPOINT_TIMEOUT)),
        )
    )
    made = {axis.group for axis in axes.values() if axis.group is not dist.group.WORLD}
    for each in (device_mesh, expert_mesh):
        for name in each.mesh_dim_names or ():
            _set_timeout(each.get_group(name), timeout)
    for axis in axes.values():
        _set_timeout(axis.group, timeout)
    return Mesh(
        device=device,
        rank=launch.rank,
        world_size=launch.world_size,
        device_mesh=device_mesh,
        expert_mesh=expert_mesh,
        **axes,
        host_group=host,
        checkpoint_group=checkpoint,
        timeout=timeout,
        _closes=(None,) if ours else (host, checkpoint, *made),
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


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says of this process; ``address`` None: it runs alone."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Return what torchrun (or a scheduler that sets the same variables) says of this process.

    Raises UserError for a variable that is missing, is not a number or contradicts another.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not given:
        return Launch(rank=0, world_size=1, local_rank=0, address=None)
    numbers = {"LOCAL_RANK": 0}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name)
        if text is None:
            if name != "LOCAL_RANK":
                raise UserError(
                    f"the environment has {given[0]} but not {name}; start the run with torchrun, "
                    f"or unset {given[0]} to run one process"
                )
        elif text.isdecimal():
            numbers[name] = int(text)
        else:
            raise UserError(
                f"{name}={text!r} in the environment is not a number; start the run with torchrun"
            )
    rank, world_size = numbers["RANK"], numbers["WORLD_SIZE"]
    if rank >= world_size:
        raise UserError(
            f"RANK={rank} in the environment must be below WORLD_SIZE={world_size}; start the run "
            "with torchrun"
        )
    address = None
    if world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE={world_size} in the environment needs {missing[0]}, where the ranks "
                "meet; start the run with torchrun, which sets it"
            )
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return Launch(rank, world_size, numbers["LOCAL_RANK"], address)


def launched_world_size() -> int:
    """Return how many ranks the launcher (or the caller's process group) has started."""
    return dist.get_world_size() if dist.is_initialized() else read_launch(os.environ).world_size


def _arrange(
    degrees: Degrees, device_type: str
) -> tuple[DeviceMesh, DeviceMesh, dict[AxisName, Axis]]:
    """Return the mesh, the mesh with ep in it, and this rank's axes."""
    mesh = init_device_mesh(
        device_type,
        (degrees.pp, degrees.replicas, degrees.shard, degrees.tp),
        mesh_dim_names=("pp", "replicas", "shard", "tp"),
    )
    # An axis that is there already gets no second group: each costs memory and time to connect.
    hdp = mesh["shard"] if degrees.replicas == 1 else mesh["replicas", "shard"]._flatten("hdp")
    alone = next((mesh[name] for name in ("replicas", "tp", "pp") if mesh[name].size() == 1), None)
    if degrees.ep == 1 and alone is not None:
        experts, ep, same_experts = mesh, alone, hdp
    else:
        # Unflattened rather than made anew: FSDP2 wants its mesh and that of the parameter it
        # shards to descend from one.
        experts = mesh._unflatten(
            2, (degrees.shard // degrees.ep, degrees.ep), ("expert_shard", "ep")
        )
        ep, same_experts = experts["ep"], experts["expert_shard"]
        if degrees.replicas > 1:
            same_experts = experts["replicas", "expert_shard"]._flatten("edp")
    submeshes: dict[AxisName, DeviceMesh] = {
        "pp": mesh["pp"],
        "hdp": hdp,
        "tp": mesh["tp"],
        "ep": ep,
        "edp": same_experts,
    }
    axes = {
        name: Axis(each.get_local_rank(), each.size(), each.get_group())
        for name, each in submeshes.items()
    }
    return mesh, experts, axes | {"stage": _stage(mesh, axes)}


def _stage(mesh: DeviceMesh, axes: Mapping[AxisName, Axis]) -> Axis:
    """Return hdp x tp, which is mostly an axis that is there already."""
    if axes["tp"].size == 1:
        return axes["hdp"]
    if axes["hdp"].size == 1:
        return axes["tp"]
    if axes["pp"].size == 1:
        everyone = dist.group.WORLD
        assert everyone is not None
        return Axis(dist.get_rank(), dist.get_world_size(), everyone)
    stage = mesh["replicas", "shard", "tp"]._flatten("stage")
    return Axis(stage.get_local_rank(), stage.size(), stage.get_group())


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


def _start(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    """Start the default process group: gloo for host tensors, nccl beside it for CUDA's."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launch.address is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    try:
        # env:// rather than a store of our own: torchrun has its store running at that address.
        dist.init_process_group(
            backend,
            init_method="env://",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        raise UserError(
            f"rank {launch.rank} did not meet the other ranks of WORLD_SIZE={launch.world_size} at "
            f"{launch.address} within parallel.timeout_s={timeout.total_seconds():.0f}; check that "
            f"all were started and can reach that address ({error})"
        ) from error
