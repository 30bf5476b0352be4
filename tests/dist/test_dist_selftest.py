"""Self-test of machines: all messages arrive, gradients agree, and faults are detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from allometry.configs.loader import load
from allometry.models.layers import Linear
from allometry.parallel.mesh import open_mesh
from allometry.studies.certificate.small import shrunk
from allometry.studies.selftest.machine import measure_disk
from allometry.studies.selftest.messages import SHIFTS, Message
from allometry.studies.selftest.network import time_messages
from allometry.studies.selftest.selftest import check_gradients

RunRanks = Callable[..., list[Any]]
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", *SHIFTS)
CPU = torch.device("cpu")


def timed(kinds: tuple[str, ...], ranks: int, broken: str | None) -> dict[str, tuple[int, ...]]:
    """(On each rank) the ranks with wrong data, by kind of message."""
    config = load("preset:demo")
    messages = [
        Message(kind, "hdp", ranks, size, dtype, per_step=1)
        for kind in kinds
        for size, dtype in ((96, "bfloat16"), (3000, "float32"), (480, "int64"))
    ]
    all_reduce = dist.all_reduce

    def wrong(tensor: torch.Tensor, *given: Any, **more: Any) -> Any:
        work = all_reduce(tensor, *given, **more)
        if dist.get_rank() == 1 and more["group"].group_desc != "host objects":
            tensor[-1] += 1
        return work

    with open_mesh(config.parallel, CPU) as mesh, pytest.MonkeyPatch.context() as patch:
        if broken:
            patch.setattr(dist, "all_reduce", wrong)
        timings = time_messages(mesh, messages, 0.5)
    assert all(timing.seconds > 0 and timing.repeats >= 3 for timing in timings)
    assert all(timing.slowest_seconds >= timing.seconds for timing in timings)
    found: dict[str, tuple[int, ...]] = {}
    for timing in timings:
        found.setdefault(timing.message.kind, ())
        found[timing.message.kind] += timing.wrong_ranks
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_kinds_of_messages_arrive(run_ranks: RunRanks, ranks: int) -> None:
    for found in run_ranks(timed, ranks, KINDS, ranks, None):
        assert found == dict.fromkeys(KINDS, ())


def test_a_wrong_sum_is_found_where_it_is(run_ranks: RunRanks) -> None:
    for found in run_ranks(timed, 2, ("all-reduce", "all-gather"), 2, "all-reduce"):
        assert found == {"all-reduce": (1, 1, 1), "all-gather": ()}


def gradients(preset: str, overrides: list[str], broken: bool) -> tuple[bool, float, str]:
    """(On each rank) whether the check passed, and its worst error."""
    config = load(f"preset:{preset}", overrides)
    small = shrunk(config, dist.get_world_size())
    with open_mesh(small.parallel, CPU) as mesh, pytest.MonkeyPatch.context() as patch:
        if broken and mesh.rank == 1:
            forward = Linear.forward
            patch.setattr(Linear, "forward", lambda self, x: forward(self, x) * 1.001)
        check = check_gradients(small, mesh)
    return check.passed, check.worst, check.where


@pytest.mark.parametrize(
    ("preset", "ranks", "overrides"),
    [
        ("demo", 2, ["parallel.tp=2"]),
        ("dense_1b", 4, ["parallel.pp=2", "parallel.zero.stage=2"]),
        ("moe_demo", 2, ["parallel.ep=2"]),
        ("documents_demo", 2, []),
    ],
)
def test_gradients_of_a_small_model_in_the_same_layout(
    run_ranks: RunRanks, preset: str, ranks: int, overrides: list[str]
) -> None:
    results = run_ranks(gradients, ranks, preset, overrides, False)
    assert all(passed for passed, _, _ in results), results
    assert len(set(results)) == 1  # all ranks report the same result


def test_a_rank_that_computes_something_else_is_found(run_ranks: RunRanks) -> None:
    for passed, worst, _ in run_ranks(gradients, 2, "demo", ["parallel.zero.stage=1"], True):
        assert not passed
        assert worst > 1e-5


def disk(folder: str) -> tuple[float, float, list[str]]:
    """(On each rank) the rates of the disk, and the files left on it."""
    with open_mesh(load("preset:demo").parallel, CPU) as mesh:
        rates = measure_disk(mesh, Path(folder) / "runs" / "one", 3 * 2**20)
        mesh.barrier("looking")
    return (
        rates.write_bytes_per_s,
        rates.read_bytes_per_s,
        [each.name for each in Path(folder).iterdir()],
    )


def test_the_disk_is_measured_and_left_as_it_was(run_ranks: RunRanks, tmp_path: Path) -> None:
    for wrote, read, left in run_ranks(disk, 2, str(tmp_path)):
        assert wrote > 0
        assert read > 0
        assert left == []
