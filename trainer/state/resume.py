"""Deciding what a launch does with the folder it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.trainer.state import checkpoint
from allometry.trainer.state.branch import branch, stored_config
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.unchanged import check_unchanged


@dataclass(frozen=True)
class Start:
    """Where a launch begins: ``checkpoint`` is None for a run that starts from nothing.

    ``branched``: it was just taken over from the run that ``run.parent`` names.
    """

    checkpoint: Path | None
    facts: dict[str, Any] | None
    cleaned: list[str]
    abandoned: list[str]
    dropped_rows: int
    branched: bool = False

    @property
    def step(self) -> int:
        """Steps already taken."""
        return int(self.facts["step"]) if self.facts else 0

    @property
    def weights_only(self) -> bool:
        """Whether the checkpoint holds parameters alone, as ``allometry convert`` makes them."""
        return bool(self.facts and self.facts.get("weights_only", False))


def begin(
    folder: RunFolder,
    config: RunConfig,
    fingerprints: dict[str, Any],
    stop_at_step: int | None = None,
) -> Start:
    """Claim the folder and find where to continue; called on the main rank.

    Raises UserError: the folder is in use, must be new and is not, its checkpoint (or that of the
    run it branches from) is damaged or gone, ``stop_at_step`` is past, or the configuration changes
    what may not change. Nothing is written before all of that is known.
    """
    folder.claim()
    try:
        if folder.is_new():
            if config.run.resume not in ("auto", "never"):
                raise UserError(
                    f"run.resume={config.run.resume}: {folder.path} holds no run to go back to; "
                    "use run.resume=auto"
                )
            start = _begin_anew(folder, config, fingerprints, stop_at_step)
        else:
            start = _continue(folder, config, fingerprints, stop_at_step)
        if not _finished(config, start.step):
            write_atomically(folder.config, dump(config))
    except OSError as error:
        folder.release()
        raise UserError(f"run.folder={folder.path} cannot be written: {error.strerror}") from None
    except UserError:
        folder.release()
        raise
    return start


def _begin_anew(
    folder: RunFolder, config: RunConfig, fingerprints: dict[str, Any], stop_at_step: int | None
) -> Start:
    parent = config.run.parent
    if parent is None:
        return Start(None, None, [], [], 0)
    _check_stop(folder, parent.step, stop_at_step)
    cleaned = checkpoint.clean(folder)
    path = branch(folder, config, parent, lambda facts: _check_facts(config, facts, fingerprints))
    return Start(path, checkpoint.read_facts(path), cleaned, [], 0, branched=True)


def _continue(
    folder: RunFolder, config: RunConfig, fingerprints: dict[str, Any], stop_at_step: int | None
) -> Start:
    if config.run.resume == "never":
        raise UserError(
            f"run.folder={folder.path} already holds a run and run.resume=never; choose another "
            "folder or use run.resume=auto"
        )
    old = stored_config(folder)
    # A launch that was told to go back has done so: the same command then goes on from there.
    again = config.run.resume == old.run.resume
    path = checkpoint.choose(folder, "auto" if again else config.run.resume)
    facts = checkpoint.read_facts(path) if path else None
    step = int(facts["step"]) if facts else 0
    _check_stop(folder, step, stop_at_step)
    if facts is not None and path is not None:
        # Nothing was trained on imported weights yet: only their own description is settled.
        settled = ("model", "parameterization") if facts.get("weights_only") else None
        check_unchanged(old, config, step, settled)
        _check_facts(config, facts, fingerprints)
        write_atomically(folder.latest, path.name + "\n")
    return Start(
        checkpoint=path,
        facts=facts,
        cleaned=checkpoint.clean(folder),
        abandoned=checkpoint.abandon_after(folder, step),
        dropped_rows=folder.forget_after(step),
    )


def _finished(config: RunConfig, step: int) -> bool:
    """Whether no step is left: the launch then changes nothing that the folder says."""
    plan = BatchPlan(config.batch, config.data.sequence_length)
    return step >= resolve_schedule(config, plan).total_steps


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
    if not config.schedule.reads_file or facts.get("weights_only", False):
        return
    plan = BatchPlan(config.batch, config.data.sequence_length)
    schedule = resolve_schedule(config, plan)
    steps = range(1, int(facts["step"]) + 1)
    s1 = sum(config.optimizer.lr * schedule.fraction(step) for step in steps)
    if not math.isclose(s1, facts["areas"]["s1"], rel_tol=1e-9):
        raise UserError(
            "the file of schedule.kind=refined changed, so that steps already taken would have had "
            "other learning rates; restore it or choose another run.folder"
        )


def _check_data(facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    for name, known in facts.get("data", {}).items():
        if fingerprints.get(name) != known:
            raise UserError(
                f"the token files of data source {name!r} are not the ones this run was started "
                f"with ({fingerprints.get(name)} instead of {known}); restore them or choose "
                "another run.folder"
            )
