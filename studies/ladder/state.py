"""Progress of a ladder's runs, read only from their folders."""

from __future__ import annotations

import fcntl
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.laws.runs import read_lines
from allometry.studies.ladder.share import Plan, PlannedRun
from allometry.trainer.state.changed import differences
from allometry.trainer.state.status import is_held, last_row
from allometry.trainer.state.unchanged import rates_part

COMMANDS = {"ladder": "allometry ladder run", "tree": "allometry branch --tree"}
Stage = Literal["planned", "running", "partial", "diverged", "done", "changed"]


@dataclass(frozen=True)
class RunState:
    """Progress of a run.

    ``step`` and ``flops``: the last recorded, including the parent's steps; ``loss``: at that step,
    ``validation``: by source, if the row has it. ``changed``: the folder has another run than the
    ladder now describes; the other fields are then unset.
    """

    stage: Stage
    step: int = 0
    flops: int = 0
    loss: float | None = None
    validation: dict[str, float] | None = None

    @property
    def loss_text(self) -> str:
        """Held-out losses by source, or the last training loss."""
        if self.validation:
            return ", ".join(f"{name} {value:.4f}" for name, value in self.validation.items())
        return "no loss" if self.loss is None else f"loss {self.loss:.4f}"


def state_of(run: PlannedRun) -> RunState:
    """Return a run's progress; only ``check_stored`` compares its configuration."""
    folder = run.folder
    if not (folder / "config.yaml").is_file():
        return RunState("planned")
    row = last_row(folder / "metrics.jsonl")
    held_out = {
        key.removeprefix("validation/"): float(value)
        for key, value in row.items()
        if key.startswith("validation/")
    }
    step, flops = int(row.get("step", 0)), int(row.get("flops", 0))
    return RunState(_stage(run, row), step, flops, row.get("loss"), held_out or None)


def _stage(run: PlannedRun, row: dict[str, Any]) -> Stage:
    if is_held(run.folder / "run.lock"):
        return "running"
    ends = [
        event
        for event in read_lines(run.folder / "events.jsonl")
        if event.get("event") in ("finished", "not_finite", "resumed", "started")
    ]
    last = ends[-1] if ends else {}
    if last.get("event") == "finished" and last.get("step") == run.steps == row.get("step"):
        return "done"
    return "diverged" if last.get("event") == "not_finite" else "partial"


def spent(run: PlannedRun, state: RunState) -> int:
    """Return the FLOPs that a run has cost, without its parent's."""
    if state.stage == "done":
        return run.own_flops
    return min(max(0, state.flops - (run.flops - run.own_flops)), run.own_flops)


def as_stored(
    run: PlannedRun, plan: Plan, coming: Collection[str]
) -> tuple[PlannedRun, str | None]:
    """Return the run as its folder can continue it, and a remark if this differs from the plan.

    A run that has started keeps its parent. A run is trained from scratch if its parent has not
    kept the step and is not among the runs to be trained before it (``coming``). Raises UserError:
    the folder has a run that computes something else, or the run belongs to a tree and cannot
    branch.
    """
    stored = check_stored(run)
    if stored is not None:
        parent_of_it = stored.run.parent
        return _with_parent(run, parent_of_it.model_dump() if parent_of_it else None), None
    if run.parent is None:
        return run, None
    parent = next(other for other in plan.runs if other.name == run.parent)
    checkpoint = parent.folder / "checkpoints" / f"step-{run.parent_step}"
    if parent.name not in coming and not (checkpoint / "complete.json").is_file():
        if run.of == "tree":
            raise UserError(
                f"{run.name} branches from step {run.parent_step} of {parent.name}, whose folder "
                f"{parent.folder} has not kept it; remove that folder to train it again"
            )
        alone = replace(_with_parent(run, None), parent=None, parent_step=0)
        return alone, (
            f"{run.name}: {parent.name} has not kept step {run.parent_step}, so it is trained from "
            "scratch"
        )
    return run, None


def _with_parent(run: PlannedRun, parent: dict[str, Any] | None) -> PlannedRun:
    plain = run.config.model_dump(mode="json")
    plain["run"]["parent"] = parent
    return replace(run, config=RunConfig.model_validate(plain))


def stated(run: PlannedRun) -> tuple[RunState, str | None]:
    """Return a run's progress, and the message of ``check_stored`` if ``changed``."""
    try:
        check_stored(run)
    except UserError as error:
        return RunState("changed"), str(error)
    return state_of(run), None


def check_stored(run: PlannedRun) -> RunConfig | None:
    """Return the configuration in the run's folder; None if the run has not started.

    Raises UserError: the configuration computes something else than the planned one.
    """
    path = run.folder / "config.yaml"
    if not path.is_file():
        return None
    try:
        stored = load(path, recorded=True)
    except ConfigError as error:
        raise UserError(
            f"{path} was written by another version ({error}); remove that run's folder or "
            f"choose another folder for the {run.of}"
        ) from None
    for key, before, now in differences(stored, run.config):
        if not key.startswith("run.parent"):
            raise UserError(
                f"{run.folder} was trained with {key}={before!r}, and the {run.of} now says "
                f"{now!r}; restore it, remove that folder, or choose another folder for the "
                f"{run.of}"
            )
    part = rates_part(stored, run.config, run.steps)
    if part is not None:
        raise UserError(
            f"{run.folder} was begun with other learning rates from step {part} on, or another "
            f"length, than the {run.of} now says; restore it, remove that folder, or choose "
            f"another folder for the {run.of}"
        )
    return stored


@contextmanager
def only_one(folder: Path, of: str = "ladder") -> Iterator[None]:
    """Return a context that keeps other processes from training the ladder, or tree.

    Raises UserError: another process trains it, or the folder cannot be written.
    """
    path = folder / f"{of}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(path, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"folder={folder} cannot be written ({error.strerror}); choose another"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another {COMMANDS[of]} works in {folder}; wait for it or stop it"
            ) from None
        yield
