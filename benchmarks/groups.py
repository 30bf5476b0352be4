"""Measure process-group creation and owner plans, on real gloo ranks and 1,024 simulated ranks.

    python benchmarks/groups.py [--ranks 2 4 8] [--rounds 3] [--out FILE]

``torch``: the groups of ``init_device_mesh``, with one gloo group for host objects and one for
checkpoints, as in earlier versions. ``ours``: the groups of ``open_mesh``. ``ours, host groups
alone``: the gloo groups that remain on a machine with NCCL, after one object broadcast and one
object all-gather in each. Real ranks run over gloo on this machine and count their store requests,
and their open sockets after each group has summed a number. Simulated ranks make no connections:
counted are the groups that are created one after another, and the seconds. Owner plans are made for
a dense 7B model and a mixture of experts, and compared with the tests' reference algorithm, which
runs once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from contenders.machine import facts
from contenders.race import free_port
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from allometry.configs.execution import ParallelConfig
from allometry.optim.owners import plan_exchange
from allometry.optim.shards import Box, Placed
from allometry.parallel.groups import grid_of, open_groups
from allometry.parallel.mesh import open_mesh
from allometry.scaling.degrees import resolve_degrees
from allometry.trainer.state.folder import write_atomically

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from plain_owners import plain_plan

LAYOUTS = {
    2: ParallelConfig(hdp=2),
    4: ParallelConfig(hdp=2, tp=2),
    8: ParallelConfig(pp=2, hdp=2, tp=2),
    1024: ParallelConfig(pp=4, hdp=32, tp=8, ep=8),
}
CPU = torch.device("cpu")


class CountingStore(dist.Store):
    """Store that counts its requests by kind."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self.inner, self.calls = inner, Counter[str]()

    def set(self, key: str, value: str) -> None:
        self.calls["set"] += 1
        self.inner.set(key, value)

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self.inner.get(key)

    def add(self, key: str, number: int) -> int:
        self.calls["add"] += 1
        return self.inner.add(key, number)

    def wait(self, *given: Any) -> None:
        self.calls["wait"] += 1
        self.inner.wait(*given)

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        return self.inner.check(keys)

    def compare_set(self, key: str, old: str, new: str) -> bytes:
        self.calls["compare_set"] += 1
        return self.inner.compare_set(key, old, new)

    def has_extended_api(self) -> bool:
        return False

    def set_timeout(self, timeout: Any) -> None:
        self.inner.set_timeout(timeout)


def torch_groups(layout: ParallelConfig) -> list[dist.ProcessGroup]:
    """Create torch's groups; return all groups of this rank."""
    grid = grid_of(resolve_degrees(layout, dist.get_world_size()))
    sizes = (grid["pp"], grid["replicas"], grid["expert_shard"] * grid["ep"], grid["tp"])
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "replicas", "shard", "tp"))
    groups = [mesh.get_group(i) for i in range(4)]
    if grid["ep"] > 1:
        experts = mesh._unflatten(2, (grid["expert_shard"], grid["ep"]), ("expert_shard", "ep"))
        groups += [experts.get_group("expert_shard"), experts.get_group("ep")]
    if grid["tp"] > 1 and sizes[2] > 1 and grid["pp"] > 1:
        groups.append(mesh["replicas", "shard", "tp"]._flatten("stage").get_group())
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    return [*groups, dist.new_group(backend=backend), dist.new_group(backend=backend)]


def our_groups(layout: ParallelConfig) -> list[dist.ProcessGroup]:
    """Create the groups with ``open_mesh``; return all groups of this rank."""
    mesh = open_mesh(layout, CPU)
    return [*(c.group for c in mesh.communicators), mesh.host_group, mesh.checkpoint_group]


def host_groups(layout: ParallelConfig) -> list[dist.ProcessGroup]:
    """Create the gloo groups that remain next to NCCL, and use each as a run does."""
    world = dist.get_world_size()
    groups = open_groups({"pp": 1, "hdp": world}, CPU, timedelta(minutes=1), timedelta(minutes=1))
    for group in (groups.host, groups.checkpoint):
        dist.broadcast_object_list([layout], src=0, group=group)
        dist.all_gather_object([None] * world, layout, group=group)
    return [groups.host, groups.checkpoint]


MAKERS: dict[str, Callable[[ParallelConfig], list[dist.ProcessGroup]]] = {
    "torch": torch_groups,
    "ours": our_groups,
    "ours, host groups alone": host_groups,
}


def sockets() -> int:
    """Return the number of open sockets of this process."""
    held = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            held += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            continue
    return held


def real_rank(rank: int, world: int, port: int, kind: str, out: str) -> None:
    """Create the groups on a gloo rank, use each once, and write the counts and seconds."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank))
    store = CountingStore(dist.TCPStore("127.0.0.1", port, world, rank == 0))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    before, calls = sockets(), store.calls.total()
    begun = time.perf_counter()
    groups = MAKERS[kind](LAYOUTS[world])
    seconds, made = time.perf_counter() - begun, store.calls.total() - calls
    for group in groups:
        dist.all_reduce(torch.zeros(1), group=group)
    found = {"calls": made, "sockets": sockets() - before, "seconds": seconds}
    Path(out, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def real(world: int, kind: str) -> dict[str, Any]:
    """Return the maximum of each measurement over ``world`` ranks."""
    with tempfile.TemporaryDirectory() as out:
        multiprocessing.spawn(real_rank, (world, free_port(), kind, out), world)
        ranks = [json.loads(path.read_text()) for path in Path(out).iterdir()]
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}


def simulated(world: int, kind: str) -> dict[str, Any]:
    """Count the groups that one of 1,024 ranks creates in sequence, as a member or not."""
    c10d, made = dist.distributed_c10d, 0
    real_helper = c10d._new_process_group_helper

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return real_helper(*args, **kwargs)

    dist.init_process_group("fake", store=FakeStore(), rank=517, world_size=world)
    with mock.patch.object(c10d, "_new_process_group_helper", counted):
        begun = time.perf_counter()
        MAKERS[kind](LAYOUTS[world])
        seconds = time.perf_counter() - begun
    dist.destroy_process_group()
    return {"groups": made, "seconds": seconds}


def cut(size: tuple[int, int, int], dims: Sequence[tuple[int, int]], replicas: int) -> Placed:
    """Return a parameter sharded over ``dims`` (dimension, parts), outermost first."""
    boxes = [tuple((0, n) for n in size)]
    for dim, parts in dims:
        boxes = [
            (*box[:dim], (start + i * step, start + (i + 1) * step), *box[dim + 1 :])
            for box in boxes
            for start, stop in [box[dim]]
            for step in [(stop - start) // parts]
            for i in range(parts)
        ]
    return Placed(size, tuple(Box(*box) for box in boxes for _ in range(replicas)))


def owner_cases(ranks: int) -> dict[str, list[Placed]]:
    """Return the hidden matrices of two models, sharded over all ranks of a stage."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    dense = [
        cut((1, *shape), [(1, ranks)] if shape[0] % ranks == 0 else [(2, ranks)], 1)
        for shape in shapes
    ]
    experts = [
        cut((64, *s), [(0, 8), (1, ranks // 8)], 1) for s in [(1024, 2048)] * 2 + [(2048, 1024)]
    ]
    whole = [cut((1, 4096, 4096), [], ranks)] * 4
    return {"dense 7B": dense * 32, "mixture, 64 experts": [*whole, *experts] * 28}


def work(rows: int, columns: int) -> float:
    """Return the FLOPs, up to a factor, of a Newton-Schulz iteration."""
    return float(min(rows, columns) ** 2 * max(rows, columns))


def owners(ranks: int, rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of an owner plan; the reference algorithm runs once."""
    found: dict[str, Any] = {}
    for name, placed in owner_cases(ranks).items():
        timed = []
        for _ in range(rounds):
            fresh = {id(each): Placed(each.size, each.boxes) for each in placed}
            begun = time.process_time()
            plan = plan_exchange([fresh[id(each)] for each in placed], work, 5, ranks)
            timed.append(time.process_time() - begun)
        begun = time.process_time()
        plain = plain_plan(placed, work, 5, ranks)
        assert plain.owned == plan.owned
        found[name] = {
            "matrices": sum(each.size[0] for each in placed),
            "ours_s": statistics.median(timed),
            "plain_s": time.process_time() - begun,
            "buckets": len(plan.buckets),
            "apart": plan.apart,
        }
    return found


def main() -> None:
    """Run all measurements, print the results, and write ``--out`` as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {**facts(), "real": {}, "simulated": {}}
    for world in given.ranks:
        result["real"][world] = {kind: real(world, kind) for kind in MAKERS}
        print(world, json.dumps(result["real"][world]), flush=True)
    result["simulated"][1024] = {kind: simulated(1024, kind) for kind in ("torch", "ours")}
    print(1024, json.dumps(result["simulated"]), flush=True)
    result["owners"] = {1024: owners(1024, given.rounds)}
    print(json.dumps(result["owners"]), flush=True)
    if given.out:
        write_atomically(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
