"""What one process does for a certificate: all jobs in turn, those it has a rank in."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.data.documents import DocumentStream
from allometry.data.stream import open_stream
from allometry.laws.areas import LearningRateAreas
from allometry.optim.build import init_states
from allometry.parallel.hdp.plan import Unit
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.layout import Layout
from allometry.scaling.plan import RunPlan
from allometry.studies.certificate import step as certificate
from allometry.trainer.assemble import make_model, make_optimizer
from allometry.trainer.feed import DeviceBatch, DocumentPlanner, document_batch
from allometry.trainer.loop import Progress, state_tensors
from allometry.trainer.state import checkpoint
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.train import train

CPU = torch.device("cpu")
TYPES = ("fp64", "fp32")
STOP = 2


@dataclass(frozen=True)
class Job:
    """A layout to run on the first ``world_size`` processes, with its results in ``folder``."""

    name: str
    world_size: int
    config: RunConfig
    folder: Path


def main(rank: int, jobs: Sequence[Job], scratch: Path) -> None:
    """Run every job that has this rank; the first one is that of one process."""
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
            # The first to be here waits for those that still run a job without it.
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
    """The references: gradients, a straight run, and one that stopped half-way."""
    for dtype in TYPES:
        config = _in(job.config, dtype)
        result = certificate.reference_step(config, batches(config))
        torch.save(result.gradients, job.folder / f"gradients-{dtype}.pt")
    _train(job, "straight")
    _train(job, "stopped", STOP)


def _layout(job: Job, rank: int, scratch: Path) -> None:
    found: dict[str, Any] = {"gradients": {}}
    for dtype in TYPES:
        config = _in(job.config, dtype)
        wanted = torch.load(scratch / "alone" / f"gradients-{dtype}.pt", mmap=True)
        with open_mesh(config.parallel, CPU) as mesh:
            result = certificate.layout_step(config, mesh, batches(config), _share(config, mesh))
        errors = certificate.relative_errors(result.gradients, wanted)
        found["gradients"][dtype] = max(errors, key=lambda pair: pair[1])
    _train(job, "straight")
    _train(job, "resumed", STOP - 1)
    _train(job, "resumed", STOP)
    _train(job, "resumed")
    stopped = scratch / "alone" / "stopped"
    if rank == 0:
        shutil.copytree(stopped, job.folder / "moved")
    dist.barrier()
    _train(job, "moved")
    _rewrite(job, stopped)
    write_atomically(job.folder / f"rank-{rank}.json", json.dumps(found))


def batches(config: RunConfig) -> list[DeviceBatch]:
    """The run's first step in micro-batches of one sequence, or one whole document, each."""
    stream = open_stream(config.data, config.run.seed)
    sequences = config.batch.sequences
    if isinstance(stream, DocumentStream):
        pieces = stream.pieces(0, sequences)
        alone = [Unit(documents=(number,), ring=(0,)) for number in range(len(pieces))]
        return [document_batch(unit, 0, pieces, CPU) for unit in alone]
    return [
        DeviceBatch.of(stream.batch(position, 1), CPU, position) for position in range(sequences)
    ]


def _share(config: RunConfig, mesh: Mesh) -> list[DeviceBatch] | None:
    """This rank's micro-batches of the same step, where documents are shared out by a plan."""
    stream = open_stream(config.data, config.run.seed)
    if not isinstance(stream, DocumentStream):
        return None
    planner = DocumentPlanner(config, Layout.of(config, mesh.world_size))
    pieces = stream.pieces(0, config.batch.sequences)
    plan = planner.plan(pieces.lengths.tolist())
    return planner.batches(plan, pieces, mesh.hdp.rank, CPU, position=0)


def losses(folder: Path) -> list[float]:
    """The recorded losses of a run, step by step."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _in(config: RunConfig, dtype: str) -> RunConfig:
    training = config.training.model_copy(update={"compute_dtype": dtype})
    return config.model_copy(update={"training": training})


def _named(job: Job, name: str) -> RunConfig:
    changes = {"folder": str(job.folder / name), "resume": "auto", "parent": None}
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
        checkpoint.load(
            source / "checkpoints" / f"step-{STOP}", state_tensors(parallel, optimizer), mesh
        )
        folder = RunFolder(config.run.folder)
        if mesh.is_main:
            folder.checkpoints.mkdir(parents=True)
            write_atomically(folder.config, dump(config))
        mesh.barrier("writing a checkpoint")
        facts = Progress(STOP, LearningRateAreas(plan.warmup_steps)).facts(
            plan, open_stream(config.data, config.run.seed), config.run.seed
        )
        writer = Checkpointer(folder, config.checkpoint, mesh, _report)
        writer.save(STOP, state_tensors(parallel, optimizer), facts)
        writer.wait()
        mesh.barrier("going on")


def _report(kind: str, **details: Any) -> None:
    assert kind != "checkpoint_failed", details
