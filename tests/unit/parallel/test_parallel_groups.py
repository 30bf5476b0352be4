"""Groups at sizes too large to start: 1,024 ranks, one of them real."""

from __future__ import annotations

import math
import resource
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from allometry.configs.execution import ParallelConfig
from allometry.parallel import groups
from allometry.parallel.groups import AXES, allow_sockets, grid_of, open_groups, parts_of, warm_up
from allometry.parallel.simulate import simulated_rank
from allometry.parallel.wire import on_wire, sum_over
from allometry.scaling.degrees import Degrees, resolve_degrees

LAYOUT = ParallelConfig(pp=4, hdp=32, tp=8, ep=8)
CPU = torch.device("cpu")


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls that create groups or access the store."""
    calls: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    counting(dist.distributed_c10d, "_new_process_group_helper")
    counting(dist.distributed_c10d, "_store_based_barrier")
    return calls


@pytest.mark.parametrize("rank", [0, 517, 1023])
def test_1024_ranks_in_a_call_for_each_axis(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    calls = counted(monkeypatch)
    with simulated_rank(LAYOUT, rank, 1024) as mesh:
        assert (mesh.pp.size, mesh.hdp.size, mesh.tp.size, mesh.ep.size) == (4, 32, 8, 8)
        assert sum(calls.values()) <= 12, calls
        assert len(mesh.communicators) == 6
    calls.clear()
    with simulated_rank(LAYOUT, rank, 1024):
        many = calls.total()
    calls.clear()
    with simulated_rank(ParallelConfig(pp=2, hdp=4, tp=2, ep=2), 3, 16):
        assert calls.total() == many, "as many as there are axes, whatever the number of ranks"


@pytest.mark.parametrize("rank", [0, 5, 23])
@pytest.mark.parametrize(
    "layout",
    [
        Degrees(pp=2, hdp=6, tp=2, ep=3, replicas=1),
        Degrees(pp=1, hdp=12, tp=2, ep=2, replicas=3),
        Degrees(pp=3, hdp=8, tp=1, ep=1, replicas=2),
        Degrees(pp=1, hdp=24, tp=1, ep=1, replicas=24),
    ],
)
def test_groups_are_those_that_torch_makes(layout: Degrees, rank: int) -> None:
    config = ParallelConfig.model_validate(
        {
            "pp": layout.pp,
            "hdp": layout.hdp,
            "tp": layout.tp,
            "ep": layout.ep,
            "zero": {"stage": 1, "replicas": layout.replicas},
        }
    )
    assert resolve_degrees(config, 24) == layout
    with simulated_rank(config, rank, 24) as mesh:
        grid = grid_of(layout)
        twin = init_device_mesh("cpu", tuple(grid.values()), mesh_dim_names=tuple(grid))
        for axis, dims in AXES.items():
            ours = group_of(mesh, axis)
            if ours is None:
                continue
            names = tuple(dim for dim in grid if dim in dims)
            wanted = twin[names if len(names) > 1 else names[0]]
            assert dist.get_process_group_ranks(ours) == wanted.mesh.flatten().tolist(), axis
        long = [c.group for c in mesh.communicators]
        ranks = [tuple(dist.get_process_group_ranks(group)) for group in long]
        assert len(set(ranks)) == len(ranks), "the same ranks have one group"
        assert all(len(each) > 1 for each in ranks)
        alone = {id(mesh.axis(a).group) for a in ("pp", "tp", "ep") if mesh.axis(a).size == 1}
        assert len(alone) <= 1, "and so has a rank with itself"


def group_of(mesh: Any, axis: str) -> dist.ProcessGroup | None:
    if hasattr(mesh, axis):
        group: dist.ProcessGroup = mesh.axis(axis).group
        return group
    for each in (mesh.device_mesh, mesh.expert_mesh):
        if axis in (each.mesh_dim_names or ()):
            found: dist.ProcessGroup = each.get_group(axis)
            return found
    return None


def test_parts_of_a_grid_are_a_partition_in_ascending_order() -> None:
    grid = {"pp": 2, "replicas": 3, "expert_shard": 2, "ep": 4, "tp": 2}
    for dims in AXES.values():
        parts = parts_of(grid, dims)
        assert sorted(parts.flatten().tolist()) == list(range(96))
        assert parts.shape[1] == math.prod(grid[dim] for dim in dims)
        assert (parts[:, 1:] > parts[:, :-1]).all()
    assert parts_of(grid, ()).shape == (96, 1)


def test_with_a_bound_device_all_ranks_split_once_for_each_axis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits: list[list[list[int]]] = []
    device = torch.device("cuda", 0)

    def split(split_ranks: list[list[int]], timeout: Any, group_desc: str) -> Any:
        splits.append(split_ranks)
        everyone = dist.group.WORLD
        assert everyone is not None
        everyone.bound_device_id = None
        try:
            return groups._make(
                torch.tensor(split_ranks).numpy(), f"split/{group_desc}", CPU, timeout
            )
        finally:
            everyone.bound_device_id = device

    with simulated_rank(ParallelConfig(), 5, 64) as mesh:
        everyone = dist.group.WORLD
        assert everyone is not None
        monkeypatch.setattr(dist, "split_group", split)
        host = dist.new_group
        monkeypatch.setattr(dist, "new_group", lambda **given: host(backend="fake"))
        everyone.bound_device_id = device
        grid = grid_of(Degrees(pp=2, hdp=8, tp=4, ep=2, replicas=1))
        open_groups(grid, device, mesh.timeout, mesh.timeout)
        everyone.bound_device_id = None
    # pp, hdp, tp, ep, edp, stage, and one for all axes of one rank: replicas.
    assert [len(parts) for parts in splits] == [32, 8, 16, 32, 16, 2, 64]
    for parts in splits:
        assert sorted(rank for part in parts for rank in part) == list(range(64))


def note_sum(sums: list[int], tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    sums.append(group.size())


def note_peers(greeted: list[list[int | None]], messages: list[dist.P2POp]) -> list[dist.Work]:
    greeted.append([message.group_peer for message in messages])
    return []


def test_all_communicators_are_warmed_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for rank in (0, 77, 127):
        sums: list[int] = []
        greeted: list[list[int | None]] = []
        with (
            simulated_rank(ParallelConfig(pp=4, hdp=8, tp=4, ep=2), rank, 128) as mesh,
            monkeypatch.context() as patch,
        ):
            patch.setattr(dist, "get_backend", lambda group: "nccl")
            patch.setattr(dist, "all_reduce", partial(note_sum, sums))
            patch.setattr(dist, "batch_isend_irecv", partial(note_peers, greeted))
            warm_up(mesh.communicators, CPU)
            assert [c.axes for c in mesh.communicators if c.point_to_point] == [
                ("pp",),
                ("hdp", "shard"),
            ]
        assert greeted == [
            [(place + 1) % size, (place - 1) % size, (place - 1) % size, (place + 1) % size]
            for place, size in ((mesh.pp.rank, 4), (mesh.hdp.rank, 8))
        ]
        orders.append(sums)
    assert orders == [[4, 8, 4, 2, 4, 32]] * 3


def test_nccl_is_handed_what_lies_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_rank(ParallelConfig(), 0, 2) as mesh:
        tensor, group = torch.ones(3), mesh.hdp.group
        assert on_wire(tensor, group) is tensor
        copies: list[torch.Tensor] = []

        def cuda(self: torch.Tensor) -> torch.Tensor:
            copies.append(self.clone())
            return copies[-1]

        def doubled(given: torch.Tensor, group: Any) -> None:
            assert given is copies[-1]
            given.mul_(2.0)

        monkeypatch.setattr(torch.Tensor, "cuda", cuda)
        monkeypatch.setattr(dist, "all_reduce", doubled)
        monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
        sum_over(tensor, group)
        monkeypatch.undo()
        assert tensor.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("limits", "world", "wanted"),
    [
        ((1024, 1_000_000), 1024, 5120),
        ((1024, 4096), 1024, 4096),
        ((1024, resource.RLIM_INFINITY), 1024, 5120),
        ((65536, 65536), 1024, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 8, None),
    ],
)
def test_open_files_of_a_process(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], world: int, wanted: int | None
) -> None:
    made: list[tuple[int, int]] = []
    note: Callable[[int, tuple[int, int]], None] = lambda _, both: made.append(both)  # noqa: E731
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", note)
    allow_sockets(world)
    assert made == ([] if wanted is None else [(wanted, limits[1])])
