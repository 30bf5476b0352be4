"""Estimate the cost of the study: runs, tokens, FLOPs, and hours at this machine's rate."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from allometry.scaling.count import count_parameters, flops_per_token
from allometry.scaling.shapes import at_width, resize
from allometry.studies.sweeps.probe import Probe
from allometry.studies.sweeps.transfer import RunShape, TransferSweep
from contenders.families import optimizer
from contenders.study_families import Entry

PLACED, SHARED = 5, 4
"""Expected number of rates of a size tried with one seed, and with every seed, for the estimate. A
sweep whose best rates move takes more runs."""
WARM, TIMED = 1, 2
"""Steps before the timed steps, and timed steps."""


@dataclass(frozen=True)
class Job:
    """Runs of one size of a row."""

    entry: Entry
    size: int
    run: RunShape
    seconds_a_step: float

    @property
    def runs(self) -> int:
        """Return the expected number of runs."""
        return PLACED + SHARED * (self.entry.cut.seeds - 1)

    @property
    def tokens(self) -> int:
        """Return the tokens of one run."""
        return self.run.steps * self.run.sequences * self.entry.cut.length

    @property
    def flops(self) -> float:
        """Return the FLOPs of one run: 6 per parameter and token, plus attention scores."""
        model = resize(self.entry.model, self.entry.axis, self.size)
        return flops_per_token(model, self.entry.cut.length).total * float(self.tokens)

    @property
    def hours(self) -> float:
        """Return the hours of one run on one thread."""
        return self.run.steps * self.seconds_a_step / 3600.0


def shape(entry: Entry, size: int) -> RunShape:
    """Return the steps and the batch of a size, without its text."""
    empty = np.zeros((0, entry.cut.length + 1), np.int64)
    sweep = TransferSweep(
        model=entry.model,
        parameterization=entry.config,
        optimizer=optimizer(entry.kind, 1.0),
        pool_PL=empty,
        held_out_HL=empty,
        axis=entry.axis,
        steps=entry.steps,
        sequences=entry.cut.sequences,
        warmup_steps=entry.warmup_steps,
    )
    return sweep.run_of(size)


def jobs(rows: Sequence[Entry], known: Path) -> list[Job]:
    """Return the sizes of all rows with the measured seconds of a step, stored in a file.

    Each shape (model, optimizer, batch) is timed once: 2 steps after a warm-up step, on one thread,
    in CPU seconds of this process, which exclude other load on the machine.
    """
    seconds: dict[str, float] = json.loads(known.read_text()) if known.is_file() else {}
    made = []
    for entry in rows:
        for size in entry.sizes:
            run, key = shape(entry, size), _key(entry, size)
            if key not in seconds:
                seconds[key] = _seconds(entry, size, run)
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
            made.append(Job(entry, size, run, seconds[key]))
    return made


def _key(entry: Entry, size: int) -> str:
    """Return a key of all settings that determine the time of a step."""
    model = resize(entry.model, entry.axis, size)
    model = at_width(model, model.width)  # writes out the head width
    run = shape(entry, size)
    text = f"{model.model_dump_json()} {entry.kind} {run.sequences} {entry.cut.length}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _seconds(entry: Entry, size: int, run: RunShape) -> float:
    model = resize(entry.model, entry.axis, size)
    probe = Probe(model, entry.config, optimizer(entry.kind, 2.0**-10), 0)
    shape_BL = (run.sequences, entry.cut.length + 1)
    tokens_BL = np.random.default_rng(0).integers(0, model.vocab_size, shape_BL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(WARM):
            probe.step(tokens_BL, clip=1.0)
        start = time.process_time()
        for _ in range(TIMED):
            probe.step(tokens_BL, clip=1.0)
        return (time.process_time() - start) / TIMED
    finally:
        torch.set_num_threads(threads)


def within(all_jobs: Sequence[Job], most_hours: float | None) -> tuple[list[Job], list[Job]]:
    """Return the jobs whose runs take at most ``most_hours``, and the excluded jobs.

    A base is never excluded: the regrets of a row are relative to it.
    """
    if most_hours is None:
        return list(all_jobs), []
    kept = [job for job in all_jobs if job.hours <= most_hours or job.size == job.entry.sizes[0]]
    return kept, [job for job in all_jobs if job not in kept]


def lines(kept: Sequence[Job], left_out: Sequence[Job], processes: int) -> list[str]:
    """Format the plan with its arithmetic."""
    said = [
        f"runs of a size: {PLACED} rates by one seed, {SHARED} of them by each further one "
        "(planned with; a sweep whose best rates move takes more)",
        "| row | size | parameters | steps x tokens | runs | tokens, M | FLOPs a run | ms a step "
        "| GFLOP/s | hours a run | hours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job in kept:
        model = resize(job.entry.model, job.entry.axis, job.size)
        batch = job.run.sequences * job.entry.cut.length
        rate = job.flops / job.run.steps / job.seconds_a_step / 1e9
        said.append(
            f"| {job.entry.name} | {job.size} | {count_parameters(model).total:,} "
            f"| {job.run.steps:,} x {batch:,} | {job.runs} | {job.tokens / 1e6:.2f} "
            f"| {job.flops:.2e} | {1e3 * job.seconds_a_step:.1f} | {rate:.1f} | {job.hours:.3f} "
            f"| {job.runs * job.hours:.2f} |"
        )
    said += ["", "| part | rows | runs | tokens, G | FLOPs | thread-hours | hours here |"]
    said.append("|---|---|---|---|---|---|---|")
    parts = list(dict.fromkeys(job.entry.part for job in kept))
    for part in (*parts, None):
        some = [job for job in kept if part in (None, job.entry.part)]
        hours = sum(job.runs * job.hours for job in some)
        said.append(
            f"| {part or 'all'} | {len({job.entry.name for job in some})} "
            f"| {sum(job.runs for job in some):,} "
            f"| {sum(job.runs * job.tokens for job in some) / 1e9:.2f} "
            f"| {sum(job.runs * job.flops for job in some):.2e} | {hours:.1f} "
            f"| {hours / processes:.1f} |"
        )
    for entry, size, hours in _each(left_out):
        said.append(f"left out: {entry} at {size}: {hours:.2f} hours a run")
    return said


def _each(left_out: Sequence[Job]) -> list[tuple[str, int, float]]:
    return [(job.entry.name, job.size, job.hours) for job in left_out]


def sizes_of(kept: Sequence[Job]) -> Mapping[str, tuple[int, ...]]:
    """Return the sizes to run, by row."""
    found: dict[str, tuple[int, ...]] = {}
    for job in kept:
        found[job.entry.name] = (*found.get(job.entry.name, ()), job.size)
    return found
