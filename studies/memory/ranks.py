"""Memory probe on one process per rank of a layout on this machine, or on launched ranks."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.parallel.mesh import open_mesh
from allometry.parallel.rendezvous import launched_world_size
from allometry.studies.memory.live import Peak
from allometry.studies.memory.probe import Measured, predicted, probe

Job = tuple[RunConfig, int]
"""A run and its number of ranks."""


def measure(config: RunConfig, world_size: int) -> list[Measured] | None:
    """Return each rank's measurement; None on all ranks of a launch except the main rank.

    One rank runs in this process, on its device. With several ranks, each launched rank calls this
    function; without a launcher they are processes on this machine's CPU.

    For example, ``max(one.bytes for one in measure(config, 4) or [])``.

    Raises:
        UserError: the number of ranks differs from the number of launched ranks, or the run needs
            more memory than this machine has.
    """
    launched = launched_world_size()
    if launched not in (1, world_size):
        raise UserError(
            f"--world-size={world_size} but {launched} ranks were launched; leave --world-size out"
        )
    if launched == 1:
        _check_room(config, world_size)
        if world_size > 1:
            return measure_all([(config, world_size)])[0]
    with open_mesh(config.parallel) as mesh:
        everywhere = mesh.gather_objects(probe(config, mesh))
        return everywhere if mesh.is_main else None


def measure_all(jobs: Sequence[Job]) -> list[list[Measured]]:
    """Return the measurements of each rank of each run, on processes of this machine's CPU."""
    most = max(world_size for _, world_size in jobs)
    with tempfile.TemporaryDirectory(prefix="allometry-memory-") as scratch:
        try:
            torch.multiprocessing.start_processes(
                _rank, args=(jobs, scratch), nprocs=most, start_method="spawn"
            )
        except torch.multiprocessing.ProcessRaisedException as error:
            raise RuntimeError(f"a layout could not be run: {error}") from error
        return [
            [_read(Path(scratch) / f"{number}-{rank}.json") for rank in range(world_size)]
            for number, (_, world_size) in enumerate(jobs)
        ]


def _rank(rank: int, jobs: Sequence[Job], scratch: str) -> None:
    """Run, in one process, every job with this rank."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for number, (config, world_size) in enumerate(jobs):
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/meeting-{number}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(hours=2),  # this process may wait for others in another job
        )
        try:
            with open_mesh(config.parallel, torch.device("cpu")) as mesh:
                found = json.dumps(asdict(probe(config, mesh)))
                Path(scratch, f"{number}-{rank}.json").write_text(found)
                mesh.barrier("measuring memory")
        finally:
            dist.destroy_process_group()


def _read(path: Path) -> Measured:
    found = json.loads(path.read_text())
    return Measured(found["rank"], Peak(**found["peak"]), found["allocated"], found["saved"])


def _check_room(config: RunConfig, world_size: int) -> None:
    if torch.cuda.is_available() and world_size == 1:
        free, where = torch.cuda.mem_get_info()[0], "this GPU"
    else:
        free, where = psutil.virtual_memory().available, "this machine"
    needed = world_size * predicted(config, world_size, "cpu", None).total
    if needed > free:
        raise UserError(
            f"--probe takes two real steps, about {needed / 2**30:.1f} GiB in all, and {where} has "
            f"{free / 2**30:.1f} GiB free; scale the run down by overrides, as model.num_layers=2 "
            "batch.micro_batch_sequences=1"
        )
