"""Certificate that a configuration computes the same run in several layouts.

Each layout runs on processes of this machine and is compared with one process: the trainer's steps
in fp64 and fp32, two resumes, a checkpoint moved from one process to the layout, and the export of
a checkpoint that the layout has read and written again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

from allometry.configs.errors import UserError
from allometry.configs.execution import ContextConfig
from allometry.configs.layouts import parse_parallel
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.interop.huggingface.convert import export_hf
from allometry.scaling.deepspeed import check_other_engine
from allometry.scaling.update_rules import check_exact
from allometry.studies.certificate import rank as verify_rank
from allometry.studies.certificate.rank import TOLERANCE, Job
from allometry.studies.certificate.small import STEPS, longest, small_run, smallest_batch
from allometry.trainer.record import writer as record
from allometry.trainer.state.folder import write_atomically

LOSS_TOLERANCE = 1e-5
_DEFAULTS = (
    "hdp=2",
    "hdp=4,zero.stage=3",
    "tp=2",
    "hdp=2,tp=2",
    "pp=2",
    "pp=2,pipeline.schedule=zbv_zero_bubble,hdp=2,zero.stage=1",
    "pp=2,tp=2",
)
_EXPERT_DEFAULTS = ("ep=2", "ep=4", "ep=2,tp=2", "ep=2,pp=2")


@dataclass(frozen=True)
class LayoutResult:
    """Differences of one layout from one process; ``refused``: reason for an impossible layout.

    ``steps``: the largest relative error by type and by kind (see ``StepsResult``), and its
    location: {"fp64": {"gradients": {"worst": 1e-15, "where": "head.weight"}, ...}, ...}. ``loss``:
    relative error of the losses of a run that was moved. ``resume_bit_exact``: True if the losses
    of a run with two resumes equal those of an uninterrupted run of the same layout.
    ``export_equal``: None if no Hugging Face family fits the model, for the reason in
    ``export_refused``.
    """

    layout: str
    world_size: int
    steps: dict[str, dict[str, dict[str, Any]]]
    loss: float | None = None
    resume_bit_exact: bool | None = None
    export_equal: bool | None = None
    export_refused: str | None = None
    refused: str | None = None

    @property
    def passed(self) -> bool:
        """True if all comparisons agree; False for a refused layout."""
        return (
            self.refused is None
            and all(
                self.steps[dtype][kind]["worst"] <= bound
                for dtype, bounds in TOLERANCE.items()
                for kind, bound in bounds.items()
            )
            and self.loss is not None
            and self.loss <= LOSS_TOLERANCE
            and self.resume_bit_exact is True
            and self.export_equal is not False
        )


@dataclass(frozen=True)
class Certificate:
    """Results of all layouts."""

    config_sha256: str
    results: tuple[LayoutResult, ...]
    facts: dict[str, Any]

    @property
    def passed(self) -> bool:
        """True if every possible layout agrees, and there is at least one."""
        tried = [result for result in self.results if result.refused is None]
        return bool(tried) and all(result.passed for result in tried)

    def describe(self) -> dict[str, Any]:
        """Return the certificate as JSON."""
        return {
            "passed": self.passed,
            "config_sha256": self.config_sha256,
            **self.facts,
            "tolerance": {**TOLERANCE, "loss": LOSS_TOLERANCE},
            "layouts": [{**asdict(r), "passed": r.passed} for r in self.results],
        }


def verify(
    config: RunConfig,
    layouts: Sequence[str] | None,
    out: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Compare ``layouts`` ("tp=2", "pp=2,hdp=2,zero.stage=1") with one process; write ``out``.

    None: the possible layouts of a default list, on up to 4 ranks. The model is the configuration's
    own, on random tokens, with a batch as small as the layouts allow, in fp64 and fp32 and not
    compiled. Raises UserError: a requested layout is not possible. For example,
    ``verify(config, ["tp=2", "hdp=2,zero.stage=1"], Path("out.json")).passed``.
    """
    asked = layouts is not None
    names = list(layouts) if layouts is not None else list(_DEFAULTS)
    if not asked and config.model.kind == "moe":
        names += _EXPERT_DEFAULTS
    with tempfile.TemporaryDirectory(prefix="allometry-verify-") as scratch:
        plain = small_run(config, Path(scratch))
        jobs, refused = _jobs(plain, names, Path(scratch), asked=asked)
        progress(f"{len(jobs)} layouts on up to {max(j.world_size for j in jobs)} processes")
        _run(jobs, Path(scratch), plain)
        results = [*(_judge(job, Path(scratch)) for job in jobs), *refused]
    facts = {
        "model": config.model.model_dump(mode="json"),
        "seed": config.run.seed,
        "versions": record.versions(),
        "time": round(time.time(), 3),
    }
    digest = hashlib.sha256(dump(config).encode()).hexdigest()
    certificate = Certificate(digest, tuple(results), facts)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(certificate.describe(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}") from None
    return certificate


def _jobs(
    config: RunConfig, names: Sequence[str], scratch: Path, *, asked: bool
) -> tuple[list[Job], list[LayoutResult]]:
    """Return a job for each layout, all with one batch that each layout can divide."""
    jobs: list[Job] = []
    refused: list[LayoutResult] = []
    for name in names:
        parallel = parse_parallel(name, config.parallel)
        check_other_engine(parallel.zero, "a certificate")
        check_exact(parallel.zero, "a certificate")
        world_size = parallel.pp * parallel.tp * int(parallel.hdp)
        one = config.model_copy(update={"parallel": parallel})
        try:
            smallest_batch([one], world_size)
        except UserError as error:
            if asked:
                raise UserError(f"--layout {name}: {error}") from None
            refused.append(LayoutResult(name, world_size, {}, refused=str(error)))
            continue
        jobs.append(Job(name, world_size, one, scratch / f"layout-{len(jobs)}"))
    if not jobs:
        raise UserError(
            f"no layout of {', '.join(names)} suits this model ({refused[0].refused}); name "
            "others with --layout"
        )
    batch = smallest_batch([job.config for job in jobs], *[job.world_size for job in jobs])
    sized = {"batch": config.batch.model_copy(update={"sequences": batch})}
    return [
        Job(job.name, job.world_size, job.config.model_copy(update=sized), job.folder)
        for job in jobs
    ], refused


def _run(jobs: Sequence[Job], scratch: Path, config: RunConfig) -> None:
    """Run all jobs on as many processes as the largest needs; results are written to files."""
    one: dict[str, Any] = dict.fromkeys(("pp", "tp", "ep", "hdp"), 1)
    one["zero"] = type(config.parallel.zero)()
    if config.data.kind == "documents":  # one process runs each document in full
        one["context"] = ContextConfig(capacity_tokens=longest(config))
    alone = config.model_copy(
        update={"batch": jobs[0].config.batch, "parallel": config.parallel.model_copy(update=one)}
    )
    reference = Job("one process", 1, alone, scratch / "alone")
    most = max(job.world_size for job in jobs)
    try:
        torch.multiprocessing.start_processes(
            verify_rank.main, args=([reference, *jobs], scratch), nprocs=most, start_method="spawn"
        )
    except torch.multiprocessing.ProcessRaisedException as error:
        raise RuntimeError(f"a layout could not be run: {error}") from error


def _judge(job: Job, scratch: Path) -> LayoutResult:
    apart = [
        json.loads((job.folder / f"rank-{rank}.json").read_text()) for rank in range(job.world_size)
    ]
    steps: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype, bounds in TOLERANCE.items():
        steps[dtype] = {}
        for kind in bounds:
            where, worst = max((rank[dtype][kind] for rank in apart), key=lambda pair: pair[1])
            steps[dtype][kind] = {"worst": worst, "where": where}
    alone = verify_rank.losses(scratch / "alone" / "straight")
    moved = verify_rank.losses(job.folder / "moved")
    straight, resumed = (verify_rank.losses(job.folder / n) for n in ("straight", "resumed"))
    assert len(alone) == len(moved) == len(straight) == len(resumed) == STEPS
    equal, why = _exports_equal(scratch / "alone" / "stopped", job.folder / "rewritten")
    return LayoutResult(
        layout=job.name,
        world_size=job.world_size,
        steps=steps,
        loss=float(np.max(np.abs(np.array(moved) / np.array(alone) - 1))),
        resume_bit_exact=straight == resumed,
        export_equal=equal,
        export_refused=why,
    )


def _exports_equal(ours: Path, theirs: Path) -> tuple[bool | None, str | None]:
    """Return True if two checkpoints export to the same bytes; (None, reason) without a family."""
    contents = []
    for folder in (ours, theirs):
        out = folder.with_name(f"{folder.name}-exported")
        shutil.rmtree(out, ignore_errors=True)
        try:
            export_hf(folder, out)
        except UserError as error:
            return None, str(error)
        contents.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
    return contents[0] == contents[1] and bool(contents[0]), None
