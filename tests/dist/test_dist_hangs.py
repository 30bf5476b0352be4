"""If a rank does not join a collective, all ranks learn the rank and the axis, and end."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from allometry.configs.errors import HUNG
from allometry.configs.execution import ParallelConfig
from allometry.parallel.agree import with_heartbeat
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.watch.watchdog import Watchdog

Ranks = Callable[..., list[Any]]
LATE = 1
SHORT = {"start_s": 2, "first_step_s": 2, "checkpoint_s": 2}


def sum_over_stage(mesh: Mesh) -> None:
    dist.all_reduce(torch.ones(2), group=mesh.stage.group)


def sum_over_tp(mesh: Mesh) -> None:
    mesh.all_reduce_sum(torch.ones(2), "tp")


def send_to_stage(mesh: Mesh) -> None:
    if mesh.pp.rank == LATE:
        mesh.pp.send(torch.ones(2), 0).wait()
    else:
        mesh.pp.receive(torch.ones(2), LATE)


def meet(mesh: Mesh) -> None:
    with_heartbeat(mesh, lambda: None, "opening the data")


MESSAGES: dict[str, tuple[Callable[[Mesh], None], dict[str, int]]] = {
    "hdp": (sum_over_stage, {}),
    "tp": (sum_over_tp, {"tp": 2}),
    "pp": (send_to_stage, {"pp": 2}),
    "host": (meet, {}),
}


def hang(axis: str, folder: str) -> tuple[list[int], str]:
    """Rank ``LATE`` sleeps before a collective until its watchdog reports; return its exit codes.

    The process continues, and the collective completes after all.
    """
    codes: list[int] = []
    spoken = threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        spoken.set()

    send, degrees = MESSAGES[axis]
    parallel = ParallelConfig.model_validate({"timeout_s": 2, "watch": SHORT, **degrees})
    watch = Watchdog(parallel, RunFolder(folder), end=end)
    with watch, open_mesh(parallel, torch.device("cpu"), watched=True) as mesh:
        watch.attach(mesh)
        if mesh.rank == LATE:
            spoken.wait(20)
        send(mesh)
        spoken.wait(20)
        mesh.barrier("the end")
    return codes, RunFolder(folder).log(mesh.rank).read_text()


@pytest.mark.parametrize("axis", MESSAGES)
def test_the_late_rank_and_the_axis_are_named(run_ranks: Ranks, axis: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        answers = run_ranks(hang, 2, axis, folder)
        (event,) = map(json.loads, (Path(folder) / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["late"], event["axis"]) == ("hang", [LATE], axis)
    for codes, log in answers:
        assert codes == [HUNG]
        assert event["said"] in log
        assert "test_dist_hangs.py" in log  # stacks of its threads


def fail(folder: str) -> str:
    """Rank ``LATE`` ends with an error while the other rank waits for it."""
    parallel = ParallelConfig.model_validate({"timeout_s": 2, "watch": SHORT})
    spoken = threading.Event()
    try:
        with Watchdog(parallel, RunFolder(folder), end=lambda _: spoken.set()) as watch:
            mesh = open_mesh(parallel, torch.device("cpu"), watched=True)
            watch.attach(mesh)
            if mesh.rank == LATE:
                raise MemoryError("no room")
            spoken.wait(20)  # simulates waiting in a collective
    except MemoryError:
        spoken.wait(4)  # process and connections stay for the other rank
    return ""


def test_a_rank_that_ended_is_told_from_one_that_hangs(run_ranks: Ranks) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(fail, 2, folder)
        (event,) = map(json.loads, (Path(folder) / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["late"]) == ("rank_lost", [LATE])
    assert "rank 1 has ended (MemoryError: no room)" in event["said"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3 sleep rank 1 torch", "tp2 stop", "zero0 die"])
def test_a_launch_that_hangs_ends_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    hangs = importlib.import_module("hangs")
    sys.modules.pop("hangs")
    (case,) = (case for case in hangs.cases() if case.name.startswith(name))
    hangs.write_data(tmp_path / "data")
    result = hangs.run(case, tmp_path, tmp_path / "data")
    assert result["passed"], result
