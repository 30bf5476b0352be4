"""Work of one process for a certificate: the jobs in which it has a rank, in turn."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from allometry.configs.loader import dump
from allometry.configs.optimization import Fp32States
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import open_stream
from allometry.laws.areas import LearningRateAreas
from allometry.optim.build import init_states
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.hdp.plan import Unit
from allometry.scaling.plan import RunPlan
from allometry.studies.certificate import step as certificate
from allometry.trainer.assemble import make_model, make_optimizer
from allometry.trainer.feed import (
    DeviceBatch,
    DocumentPlanner,
    document_batch,
    document_steps,
    sequence_steps,
)
from allometry.trainer.loop import Progress, state_tensors
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.room import checkpoint_bytes
from allometry.trainer.state.states import load
from allometry.trainer.train import train

CPU = torch.device("cpu")
STOP = 2
TOLERANCE = {
    "fp64": {
        "sums": 1e-10,
        "gradients": 1e-10,
        "grad_norm": 1e-10,
        "routing": 1e-10,
        "routers": 1e-10,
        "parameters": 1e-8,
    },
    "fp32": {"sums": 1e-5, "gradients": 1e-5, "grad_norm": 1e-5, "routing": 1e-5},
}
"""Largest differences of two computations of each kind (see ``StepsResult``), by type.

Two steps in fp64, one in fp32. Updates divide by roots of squared gradients, which amplifies the
rounding of the smallest gradients: parameters have a separate bound, and none in fp32.
"""


@dataclass(frozen=True)
class Job:
    """A layout to run on the first ``world_size`` processes, with its results in ``folder``."""

    name: str
    world_size: int
    config: RunConfig
    folder: Path


def main(rank: int, jobs: Sequence[Job], scratch: Path) -> None:
    """Run every job with this rank; the first job is the reference on one process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for number, job in enumerate(jobs):
        if rank >= job.world_size:
            continue
        begun = time.perf_counter()
        job.folder.mkdir(parents=True, exist_ok=True)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/meeting-{number}",
            rank=rank,
            world_size=job.world_size,
            # The first process here waits for processes that are still in a job without it.
            timeout=timedelta(hours=2),
        )
        try:
            dist.barrier()
            if number == 0:
                _alone(job)
            else:
                _layout(job, rank, scratch)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        if rank == 0:
            taken = time.perf_counter() - begun
            print(
                f"{number + 1}/{len(jobs)} {job.name}: {taken:.0f} s", file=sys.stderr, flush=True
            )


def _alone(job: Job) -> None:
    """Run the references: some steps, an uninterrupted run, and a run stopped half-way."""
    for dtype, tolerance in TOLERANCE.items():
        config = _in(job.config, dtype)
        result = certificate.reference_steps(config, batches(config, _count(tolerance)))
        torch.save(vars(result), job.folder / f"steps-{dtype}.pt")
    _train(job, "straight")
    _train(job, "stopped", STOP)


def _layout(job: Job, rank: int, scratch: Path) -> None:
    apart: dict[str, dict[str, tuple[str, float]]] = {}
    for dtype, tolerance in TOLERANCE.items():
        config = _in(job.config, dtype)
        kept = torch.load(scratch / "alone" / f"steps-{dtype}.pt", mmap=True, weights_only=True)
        wanted = certificate.StepsResult(**kept)
        with open_mesh(config.parallel, CPU) as mesh:
            mine = batches_of_rank(config, mesh, _count(tolerance))
            result = certificate.layout_steps(config, mesh, mine)
            held = {name for names in mesh.gather_objects(set(result.gradients)) for name in names}
            assert held == set(wanted.gradients), held ^ set(wanted.gradients)
        worst = certificate.differences(result, wanted)
        apart[dtype] = {kind: worst[kind] for kind in tolerance}
    _train(job, "straight")
    for stop in (STOP - 1, STOP, None):
        _train(job, "resumed", stop)
    stopped = scratch / "alone" / "stopped"
    if rank == 0:
        shutil.copytree(stopped, job.folder / "moved")
    dist.barrier()
    _train(job, "moved")
    _rewrite(job, stopped)
    write_atomically(job.folder / f"rank-{rank}.json", json.dumps(apart))


def batches(config: RunConfig, count: int) -> list[list[DeviceBatch]]:
    """Return the run's first steps in micro-batches of one sequence, or one document, each."""
    stream = open_stream(config.data, config.run.seed)
    sequences = config.batch.sequences
    steps = []
    for first in range(0, count * sequences, sequences):
        if isinstance(stream, DocumentStream):
            pieces = stream.pieces(first, sequences)
            alone = [Unit(documents=(number,), ring=(0,)) for number in range(len(pieces))]
            steps.append([document_batch(unit, 0, pieces, CPU, position=first) for unit in alone])
        else:
            places = range(first, first + sequences)
            steps.append([DeviceBatch.of(stream.batch(place, 1), CPU, place) for place in places])
    return steps


def batches_of_rank(config: RunConfig, mesh: Mesh, count: int) -> list[list[DeviceBatch]]:
    """Return this rank's micro-batches of the same steps, from the trainer's feeds."""
    stream = open_stream(config.data, config.run.seed)
    plan = RunPlan.of(config, mesh.world_size)
    if isinstance(stream, DocumentStream):
        steps = document_steps(stream, plan, DocumentPlanner(config, plan.layout), mesh, 0)
    else:
        steps = sequence_steps(stream, plan, mesh, 0)
    with closing(steps):
        return [step.batches for step in islice(steps, count)]


def losses(folder: Path) -> list[float]:
    """Return the recorded losses of a run, step by step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _count(tolerance: Mapping[str, float]) -> int:
    """Return the number of compared steps: a second step depends on the state after the first."""
    return 2 if "parameters" in tolerance else 1


def _in(config: RunConfig, dtype: str) -> RunConfig:
    training = config.training.model_copy(update={"compute_dtype": dtype})
    optimizer = config.optimizer
    if hasattr(optimizer, "states"):
        # Rounding of a gradient's last bit may change the FP8 value of a state.
        optimizer = optimizer.model_copy(update={"states": Fp32States()})
    return config.model_copy(update={"training": training, "optimizer": optimizer})


def _named(job: Job, name: str) -> RunConfig:
    changes = {"folder": str(job.folder / name), "resume": "auto", "parent": None}
    changes["initial"] = None
    run = job.config.run.model_copy(update=changes)
    return job.config.model_copy(update={"run": run})


def _train(job: Job, name: str, stop_at_step: int | None = None) -> None:
    train(_named(job, name), device=CPU, callbacks=[], stop_at_step=stop_at_step)


def _rewrite(job: Job, source: Path) -> None:
    """Read a checkpoint of one process in this layout, and write it again."""
    config = _named(job, "rewritten")
    plan = RunPlan.of(config, job.world_size)
    with open_mesh(config.parallel, CPU) as mesh:
        parallel = make_model(config, plan, mesh)
        optimizer = make_optimizer(config, plan, parallel, mesh)
        init_states(optimizer)
        path, state = source / "checkpoints" / f"step-{STOP}", state_tensors(parallel, optimizer)
        load(path, state, {p: n for n, p in parallel.named_parameters()}, mesh)
        folder = RunFolder(config.run.folder)
        if mesh.is_main:
            folder.checkpoints.mkdir(parents=True)
            write_atomically(folder.config, dump(config))
        mesh.barrier("writing a checkpoint")
        facts = Progress(STOP, LearningRateAreas(plan.warmup_steps)).facts(
            plan, open_stream(config.data, config.run.seed), config.run.seed
        )
        writer = Checkpointer(folder, config.checkpoint, mesh, _report, checkpoint_bytes(config))
        writer.save(STOP, state_tensors(parallel, optimizer), facts)
        writer.wait()
        mesh.barrier("going on")


def _report(kind: str, **details: Any) -> None:
    assert kind != "checkpoint_failed", details
