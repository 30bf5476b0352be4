"""Deciding what a launch does with the folder it finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from allometry.configs.errors import UserError
from allometry.configs.execution import Parent
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.data.sources import Sources
from allometry.optim.schedule import schedules_of
from allometry.parallel.agree import from_main_rank, on_all_ranks
from allometry.parallel.mesh import Mesh
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import copy_share, discard, keep, stored_config, take
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.integrity import damage_of_contents
from allometry.trainer.state.reading import continued, weights_only, with_reading
from allometry.trainer.state.refused import check_not_refused
from allometry.trainer.state.room import check_room
from allometry.trainer.state.unchanged import check_unchanged

T = TypeVar("T")
_SETTLED = ("model", "parameterization")


@dataclass(frozen=True)
class Start:
    """Where a launch begins: ``checkpoint`` is None for a run that starts from nothing.

    ``branched``: it was just taken over from the run that ``run.parent`` names. ``next_stage``: it
    was just saved, and the launch goes on in another stage.
    """

    checkpoint: Path | None
    facts: dict[str, Any] | None
    cleaned: list[str]
    abandoned: list[str]
    dropped_rows: int
    branched: bool = False
    next_stage: bool = False

    @property
    def step(self) -> int:
        """Steps already taken."""
        return int(self.facts["step"]) if self.facts else 0

    @property
    def weights_only(self) -> bool:
        """Whether the checkpoint holds parameters alone, as ``allometry convert`` makes them."""
        return weights_only(self.facts)


@dataclass(frozen=True)
class _Choice:
    """What a launch would begin from; of ``path`` only the sizes have been looked at.

    In a ``new`` folder it is a parent's checkpoint, linked there but not yet under its name.
    """

    path: Path | None
    facts: dict[str, Any] | None
    new: bool = False
    copies: tuple[tuple[Path, Path], ...] = ()  # from and to: what could not be linked


def begin(
    folder: RunFolder,
    config: RunConfig,
    stream: Sources,
    mesh: Mesh,
    stop_at_step: int | None = None,
    check: Callable[[Sources], None] = lambda stream: None,
) -> Start:
    """Claim the folder and find where to continue; every rank calls this.

    ``check`` gets the data as the run would go on with them (``continued``) and may refuse them.

    The main rank chooses a checkpoint by sizes, all ranks read their shares of its contents, and
    then the main rank writes what this launch changes.

    Raises UserError on all ranks: the folder is in use, must be new and is not, its checkpoint (or
    that of the run it branches from) is damaged or gone, ``stop_at_step`` is past, or the
    configuration changes what may not change. Nothing is written before all of that is known.
    """

    def writing(work: Callable[[], T]) -> Callable[[], T]:
        def checked() -> T:
            try:
                return work()
            except OSError as error:
                raise UserError(
                    f"run.folder={folder.path} cannot be written: {error.strerror}"
                ) from None

        return checked

    try:
        choice = from_main_rank(
            mesh,
            writing(lambda: _choose(folder, config, stream, stop_at_step, check)),
            "choosing a checkpoint",
        )
        if choice.copies:
            copy = writing(lambda: copy_share(choice.copies, mesh.rank, mesh.world_size))
            on_all_ranks(mesh, copy, "copying the parent's checkpoint")
        problem = None if choice.path is None else damage_of_contents(choice.path, mesh)
        return from_main_rank(
            mesh,
            writing(lambda: _enter(folder, config, choice, problem)),
            "preparing the run's folder",
        )
    except BaseException:
        folder.withdraw()
        raise


def next_stage(folder: RunFolder, step: int, mesh: Mesh) -> Start:
    """Return where the stage begins that follows ``step``, at the checkpoint just saved there."""
    path = folder.checkpoints / f"step-{step}"
    facts = from_main_rank(mesh, lambda: checkpoint.read_facts(path), "reading a checkpoint")
    return Start(path, facts, [], [], 0, next_stage=True)


def _choose(
    folder: RunFolder,
    config: RunConfig,
    stream: Sources,
    stop_at_step: int | None,
    check: Callable[[Sources], None],
) -> _Choice:
    """Claim the folder and choose what to begin from, without reading a shard."""

    def accept(facts: dict[str, Any], before: RunConfig) -> None:
        _check_facts(config, facts, stream.fingerprints())
        check(continued(stream, with_reading(facts, before)))

    if folder.is_new():
        check_not_refused(folder)
    folder.claim()
    parent, resume = config.run.parent, config.run.resume
    if folder.is_new():
        if resume not in ("auto", "never"):
            raise UserError(
                f"run.resume={resume}: {folder.path} holds no run to go back to; use "
                "run.resume=auto"
            )
        if parent is None:
            check(continued(stream, None))
            return _Choice(None, None, new=True)
        _check_stop(folder, parent.step, stop_at_step)
        taken = take(folder, config, parent, lambda facts: accept(facts, _config_of(parent)))
        facts = with_reading(taken.facts, _config_of(parent))
        return _Choice(taken.path, facts, new=True, copies=taken.copies)
    if resume == "never":
        raise UserError(
            f"run.folder={folder.path} already holds a run and run.resume=never; choose another "
            "folder or use run.resume=auto"
        )
    old = stored_config(folder)
    # A launch that was told to go back has done so: the same command then goes on from there.
    path = checkpoint.choose(folder, "auto" if resume == old.run.resume else resume)
    if path is None:
        _check_stop(folder, 0, stop_at_step)
        check(continued(stream, None))
        return _Choice(None, None)
    facts = checkpoint.read_facts(path)
    _check_stop(folder, facts["step"], stop_at_step)
    # Nothing was trained on imported weights yet: only their own description is settled.
    settled = _SETTLED if facts.get("weights_only") else None
    if settled is not None and facts.get("optimizer"):
        settled = (*settled, "optimizer.kind")
    check_unchanged(old, config, facts["step"], settled)
    accept(facts, old)
    return _Choice(path, with_reading(facts, old))


def _config_of(parent: Parent) -> RunConfig:
    return stored_config(RunFolder(parent.folder))


def _enter(folder: RunFolder, config: RunConfig, choice: _Choice, problem: str | None) -> Start:
    """Bring the folder to where the launch begins; ``problem`` is what is wrong with contents."""
    path, parent = choice.path, config.run.parent
    step = int(choice.facts["step"]) if choice.facts else 0
    abandoned, dropped_rows = [], 0
    if path is not None and problem is not None:
        if choice.new and parent is not None:
            raise discard(path, parent, problem)
        raise checkpoint.damaged(folder, path, problem)
    cleaned = checkpoint.clean(folder, path)
    total = _total_steps(config)
    if step < total:
        check_room(folder.path, config, len(checkpoint.saved(folder)), step, total)
    if choice.new:
        if path is not None and parent is not None:
            path = keep(folder, parent, path)
    else:
        if path is not None:
            write_atomically(folder.latest, path.name + "\n")
        abandoned = checkpoint.abandon_after(folder, step)
        dropped_rows = folder.forget_after(step)
    start = Start(
        checkpoint=path,
        facts=choice.facts,
        cleaned=cleaned,
        abandoned=abandoned,
        dropped_rows=dropped_rows,
        branched=choice.new and path is not None,
    )
    if step < total:  # else the launch changes nothing that the folder says
        write_atomically(folder.config, dump(config))
    return start


def _total_steps(config: RunConfig) -> int:
    return schedules_of(config)[-1].total_steps


def _check_stop(folder: RunFolder, step: int, stop_at_step: int | None) -> None:
    if stop_at_step is not None and step >= stop_at_step:
        raise UserError(
            f"--stop-at-step={stop_at_step} is past: {folder.path} stands at step {step}; name a "
            "later step or leave it out"
        )


def _check_facts(config: RunConfig, facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    """Refuse files that are no longer those which the steps taken have read."""
    _check_schedule_file(config, facts)
    _check_data(facts, fingerprints)


def _check_schedule_file(config: RunConfig, facts: dict[str, Any]) -> None:
    """Refuse a refined schedule whose file is no longer what the steps taken have read."""
    stages = config.of_stages()
    if not any(one.schedule.reads_file for one in stages) or facts.get("weights_only", False):
        return
    s1 = 0.0
    for one, schedule in zip(stages, schedules_of(config), strict=True):
        steps = range(schedule.first_step, min(facts["step"], schedule.total_steps) + 1)
        s1 += sum(one.optimizer.lr * schedule.fraction(step) for step in steps)
    if not math.isclose(s1, facts["areas"]["s1"], rel_tol=1e-9):
        raise UserError(
            "the file of schedule.kind=refined changed, so that steps already taken would have had "
            "other learning rates; restore it or choose another run.folder"
        )


def _check_data(facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    for name, known in facts.get("data", {}).items():
        if fingerprints.get(name, known) != known:  # whether one may be missing say the samples
            raise UserError(
                f"the token files of data source {name!r} are not the ones this run was started "
                f"with ({fingerprints[name]} instead of {known}); restore them or choose "
                "another run.folder"
            )
