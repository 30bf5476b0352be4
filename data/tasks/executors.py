"""Run the stages of a preparation on an executor of datatrove: this machine, Slurm, or Ray."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from allometry.configs.errors import UserError
from allometry.data.tasks.drops import Stage
from allometry.data.tasks.plan import Folder

Kind = Literal["local", "slurm", "ray"]
_ARRAY = 1000
"""Largest job array that is submitted; each job then runs several tasks."""


@dataclass(frozen=True)
class Engine:
    """Executor of the tasks.

    ``tasks``: number of tasks; None: one per file, at most 1000. ``workers``: number of tasks at a
    time; None: the number of cores (local), no limit (Slurm, Ray). ``sbatch``: options of sbatch as
    ``key=value``; partition and time are required. ``deduplicate``: drop near duplicates.
    ``decontaminate``: files of benchmarks whose text is dropped.
    """

    kind: Kind
    tasks: int | None = None
    workers: int | None = None
    sbatch: tuple[str, ...] = ()
    deduplicate: bool = False
    decontaminate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"engine=datatrove:{self.kind} must be one of local, slurm, ray")
        for key in ("tasks", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        if self.sbatch and self.kind != "slurm":
            raise UserError(
                f"--sbatch {self.sbatch[0]} is of --engine datatrove:slurm; leave it out"
            )
        options = self.sbatch_options()
        for key in ("partition", "time"):
            if self.kind == "slurm" and key not in options:
                raise UserError(f"Slurm needs a {key}; add --sbatch {key}=...")

    def sbatch_options(self) -> dict[str, str]:
        """Return the options of sbatch by name."""
        options = {}
        for value in self.sbatch:
            key, equals, text = value.partition("=")
            if not (key and equals) or key.startswith("-"):
                raise UserError(f"--sbatch {value} must be KEY=VALUE, such as partition=cpu")
            options[key] = text
        return options


def check_installed(engine: Engine) -> None:
    """Raise UserError with the command that installs a missing package or program."""
    needed = {"datatrove": "allometry[prepare]"}
    if engine.deduplicate or engine.decontaminate:
        needed |= {"spacy": "allometry[curate]", "regex": "allometry[curate]"}
    if engine.kind == "ray":
        needed["ray"] = "ray"
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--engine datatrove:{engine.kind} needs {module}, which is not installed; install "
                f"it with pip install '{package}'"
            )
    if engine.kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "--engine datatrove:slurm needs sbatch, which is not on this machine; run it on a "
            "login node"
        )
    if engine.kind == "slurm" and "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError(
            "--engine datatrove:slurm submits jobs and cannot run inside of a job array; run it on "
            "a login node"
        )


def run_here(engine: Engine, folder: Folder, stages: Sequence[Stage]) -> None:
    """Run the stages to their end, one after another; tasks that are complete are skipped.

    Raises:
        UserError: a task could not finish.
    """
    for name, pipeline, tasks in stages:
        workers = min(tasks, engine.workers or len(os.sched_getaffinity(0)))
        with _diverted(folder.logs / "engine.log"):
            if engine.kind == "local":
                from datatrove.executor.local import LocalPipelineExecutor

                executor: Any = LocalPipelineExecutor(
                    pipeline, tasks, workers, logging_dir=str(folder.logs / name)
                )
                executor.run()
            else:
                executor = _run_on_ray(engine, pipeline, tasks, str(folder.logs / name))
        missing = executor.get_incomplete_ranks()
        if missing:
            raise _unfinished(folder, name, missing, tasks)


def _run_on_ray(engine: Engine, pipeline: list[Any], tasks: int, logs: str) -> Any:
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        executor = RayPipelineExecutor(
            pipeline, tasks, engine.workers or -1, logging_dir=logs, cpus_per_task=1
        )
        executor.run()
        return executor
    finally:
        if started:
            ray.shutdown()


def _unfinished(folder: Folder, stage: str, missing: list[int], tasks: int) -> UserError:
    """Return the reason why the first of the tasks did not finish."""
    reason = failure(folder, missing)
    return UserError(
        reason
        if reason is not None
        else f"{len(missing):,} of {tasks:,} tasks of the stage {stage} did not finish, first task "
        f"{missing[0]}; see {folder.logs / stage} and repeat the command"
    )


def failure(folder: Folder, tasks: Sequence[int]) -> str | None:
    """Return the reason that the first failed one of ``tasks`` gave, None without one."""
    found = (folder.failure(task) for task in tasks)
    return next((path.read_text(encoding="utf-8") for path in found if path.is_file()), None)


def submit(engine: Engine, folder: Folder, stages: Sequence[Stage]) -> list[str]:
    """Submit a job array of Slurm for each stage, each after the one before; return the job ids."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    options = engine.sbatch_options()
    partition, time = options.pop("partition"), options.pop("time")
    qos = options.pop("qos", None)
    before, executors = None, []
    path = f"{Path(sys.executable).parent}:$PATH"
    for name, pipeline, tasks in stages:
        executor: Any = SlurmPipelineExecutor(
            pipeline,
            *(tasks, time, partition),
            workers=min(tasks, engine.workers) if engine.workers else -1,
            job_name=f"prepare-{name}",
            qos=qos,
            env_command=f"export PATH={path} PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
            # A job after one that failed would wait forever.
            sbatch_args={"kill-on-invalid-dep": "yes", **options},
            depends=before,
            logging_dir=str(folder.logs / name),
            tasks_per_job=math.ceil(tasks / _ARRAY),
        )
        executors.append(executor)
        before = executor
    try:
        with _diverted(folder.logs / "engine.log"):
            executors[-1].run()
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"sbatch ended with exit code {error.returncode} (its message is at the end of "
            f"{folder.logs / 'engine.log'}); change --sbatch"
        ) from None
    jobs = [str(one.job_id) for one in executors if one.job_id not in (None, -1)]
    _jobs_file(folder).write_text(json.dumps(jobs), encoding="utf-8")
    return jobs


def unfinished_jobs(folder: Folder) -> list[str]:
    """Return the submitted jobs that Slurm still lists as waiting or running."""
    path = _jobs_file(folder)
    jobs: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    listed = []
    for job in jobs:
        done = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():  # an error: Slurm has forgotten the job
            listed.append(job)
    return listed


def _jobs_file(folder: Folder) -> Path:
    return folder.work / "jobs.json"


@contextmanager
def _diverted(path: Path) -> Iterator[None]:
    """Write the standard error of this process and of its children to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with path.open("ab") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
