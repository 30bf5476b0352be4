"""Runs of a ladder, and sharing of first steps between different lengths. Without torch."""

# N parameters, D tokens and C FLOPs of a run

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from allometry.configs.format import first_names
from allometry.configs.ladder import LocalLaunch, SbatchLaunch
from allometry.configs.run import RunConfig
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.trainer.state.changed import differences
from allometry.trainer.state.unchanged import rates_part


@dataclass(frozen=True)
class PlannedRun:
    """A run of a ladder: ``config`` is its full configuration, with ``run.parent`` if it branches.

    ``parameters``: N by the ladder's count; ``tokens``: D, ``flops``: C of the complete run, in
    full steps; ``own_flops``: without the steps of its parent. ``of``: "ladder" or "tree"; a run of
    a ladder may be trained from scratch if its parent has not kept the step.
    """

    name: str
    is_target: bool
    size: str
    schedule: str
    config: RunConfig
    steps: int
    tokens: int
    parameters: int
    flops: int
    parent: str | None = None
    parent_step: int = 0
    of: Literal["ladder", "tree"] = "ladder"

    @property
    def own_flops(self) -> int:
        """FLOPs of the run's own steps."""
        plan = BatchPlan(self.config.batch, self.config.data.sequence_length)
        return self.flops - self.flops * plan.tokens_after(self.parent_step) // self.tokens

    @property
    def folder(self) -> Path:
        """Run folder."""
        return Path(self.config.run.folder)


class Plan(Protocol):
    """Runs that are trained together, each on ``processes`` ranks, in one folder."""

    @property
    def folder(self) -> Path: ...  # noqa: D102
    @property
    def runs(self) -> tuple[PlannedRun, ...]: ...  # noqa: D102
    @property
    def launch(self) -> LocalLaunch | SbatchLaunch: ...  # noqa: D102
    @property
    def processes(self) -> int: ...  # noqa: D102


def share(runs: list[PlannedRun]) -> tuple[list[PlannedRun], list[str]]:
    """Make longer runs branch from shorter ones; return the runs, and notes on other runs."""
    chains: dict[tuple[str, str, int], list[PlannedRun]] = {}
    for run in runs:
        key = (_family(run, runs), run.schedule, run.config.run.seed)
        chains.setdefault(key, []).append(run)
    alone: dict[str, list[str]] = {}
    changed: dict[str, PlannedRun] = {run.name: run for run in runs}
    for chain in chains.values():
        chain.sort(key=lambda run: run.steps)
        for shorter, longer in pairwise(chain):
            step, problem = _shared_steps(shorter, longer)
            if problem:
                alone.setdefault(problem, []).append(longer.name)
            else:
                _connect(changed, shorter.name, longer.name, step)
    order = [run.name for chain in chains.values() for run in chain]
    notes = []
    for problem, names in alone.items():
        verb = "is" if len(names) == 1 else "are"
        notes.append(f"{first_names(names)} {verb} trained from scratch: {problem}")
    return [changed[name] for name in order], notes


def _family(run: PlannedRun, runs: list[PlannedRun]) -> str:
    """Return the size whose runs may share steps: the run's own, or for the target a rung's."""
    same = (
        other.size
        for other in runs
        if run.is_target
        and not other.is_target
        and other.config.run.seed == run.config.run.seed
        and next(iter(differences(other.config, run.config)), None) is None
    )
    return next(same, f"target {run.size}" if run.is_target else run.size)


def _shared_steps(shorter: PlannedRun, longer: PlannedRun) -> tuple[int, str | None]:
    """Return the number of steps that two runs of one chain share, or a reason for none."""
    other = next(iter(differences(shorter.config, longer.config)), None)
    if other is not None:
        return 0, f"{other[0]} differs from that of the next shorter horizon"
    part = rates_part(shorter.config, longer.config, shorter.steps)
    if part == 1:
        kind = longer.config.parameterization.kind
        return 0, (
            f"schedule {longer.schedule}, its warm-up or parameterization {kind} scales learning "
            "rates with the length of the run, so that no step is shared with the next shorter one"
        )
    shared = shorter.steps if part is None else part - 1
    plan = BatchPlan(longer.config.batch, longer.config.data.sequence_length)
    warmup = resolve_schedule(longer.config, plan).warmup_steps
    if shared <= warmup:
        return 0, (
            f"schedule {longer.schedule} follows the length of the run, so that no step after the "
            "warm-up is shared with the next shorter one"
        )
    return shared, None


def branching_point(config: RunConfig, steps: int) -> int | None:
    """Return the last step that a longer run would share, kept even without a longer run."""
    tokens = config.training.total_tokens
    assert tokens is not None
    longer = _with(config, "training", {"total_tokens": 10 * tokens})
    part = rates_part(config, longer, steps)
    plan = BatchPlan(config.batch, config.data.sequence_length)
    shared = steps if part is None else part - 1
    return shared if resolve_schedule(config, plan).warmup_steps < shared < steps else None


def _connect(runs: dict[str, PlannedRun], parent: str, child: str, step: int) -> None:
    holder, branch = runs[parent].config, runs[child].config
    kept = tuple(sorted({*holder.checkpoint.keep_steps, step}))
    runs[parent] = replace(runs[parent], config=_with(holder, "checkpoint", {"keep_steps": kept}))
    link = {"folder": holder.run.folder, "step": step}
    runs[child] = replace(
        runs[child], config=_with(branch, "run", {"parent": link}), parent=parent, parent_step=step
    )


def _with(config: RunConfig, section: str, changes: dict[str, Any]) -> RunConfig:
    plain = config.model_dump(mode="json")
    plain[section] |= changes
    return RunConfig.model_validate(plain)
