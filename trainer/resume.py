"""Deciding what a launch does with the folder it finds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.loader import dump, load
from allometry.configs.run import RunConfig
from allometry.optim.schedule import resolve_schedule
from allometry.scaling.batch import BatchPlan
from allometry.trainer import checkpoint
from allometry.trainer.folder import RunFolder, write_atomically

# What may change between launches of one run, as it changes how the run is carried out and
# recorded but not what it computes. The length of the run and its schedule may change as long as
# the steps already taken used the same learning rates.
FREE = (
    "run.folder",
    "run.resume",
    "parallel",
    "evaluation",
    "checkpoint",
    "record",
    "batch.micro_batch_sequences",
    "training.compile",
    "training.activation_checkpointing",
    "data.tokenizer",
    "training.total_steps",
    "training.total_tokens",
    "schedule",
)
# The paths of a source's files may change too: their contents are compared by fingerprint.
_PATHS = ("train", "validation")


@dataclass(frozen=True)
class Start:
    """Where a launch begins: ``checkpoint`` is None for a run that starts from nothing."""

    checkpoint: Path | None
    facts: dict[str, Any] | None
    cleaned: list[str]
    abandoned: list[str]
    dropped_rows: int

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

    Raises UserError: the folder is in use, must be new and is not, its checkpoint is damaged or
    gone, ``stop_at_step`` is past, or the configuration changes what may not change. Nothing is
    written before all of that is known.
    """
    folder.claim()
    try:
        if folder.is_new():
            if config.run.resume not in ("auto", "never"):
                raise UserError(
                    f"run.resume={config.run.resume}: {folder.path} holds no run to go back to; "
                    "use run.resume=auto"
                )
            start = Start(None, None, [], [], 0)
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


def _continue(
    folder: RunFolder, config: RunConfig, fingerprints: dict[str, Any], stop_at_step: int | None
) -> Start:
    if config.run.resume == "never":
        raise UserError(
            f"run.folder={folder.path} already holds a run and run.resume=never; choose another "
            "folder or use run.resume=auto"
        )
    old = _stored(folder)
    # A launch that was told to go back has done so: the same command then goes on from there.
    again = config.run.resume == old.run.resume
    path = checkpoint.choose(folder, "auto" if again else config.run.resume)
    facts = checkpoint.read_facts(path) if path else None
    step = int(facts["step"]) if facts else 0
    if stop_at_step is not None and step >= stop_at_step:
        raise UserError(
            f"--stop-at-step={stop_at_step} is past: {folder.path} stands at step {step}; name a "
            "later step or leave it out"
        )
    if facts is not None and path is not None:
        # Nothing was trained on imported weights yet: only their own description is settled.
        settled = ("model", "parameterization") if facts.get("weights_only") else None
        check_unchanged(old, config, step, settled)
        _check_schedule_file(config, facts)
        _check_data(facts, fingerprints)
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


def _stored(folder: RunFolder) -> RunConfig:
    try:
        return load(folder.config)
    except ConfigError as error:
        raise UserError(
            f"{folder.config} was written by another version ({error}); choose another run.folder"
        ) from None


def check_unchanged(
    old: RunConfig, new: RunConfig, step: int, sections: tuple[str, ...] | None = None
) -> None:
    """Refuse a change to what a run computes, naming the key; ``step`` steps have been taken.

    With ``sections`` only these may not change.
    """
    before, after = _leaves(old.model_dump(mode="json")), _leaves(new.model_dump(mode="json"))
    for key in sorted(before.keys() | after.keys()):
        # Dropout draws its masks by micro-batch.
        masks = key == "batch.micro_batch_sequences" and new.model.dropout > 0
        if before.get(key) == after.get(key) or (_is_free(key) and not masks):
            continue
        if sections is not None and key.split(".")[0] not in sections:
            continue
        raise UserError(
            f"{key}={after.get(key)!r} differs from {before.get(key)!r}, with which "
            f"{old.run.folder} was started, and may not change when a run continues; restore it or "
            "choose another run.folder"
        )
    _check_past_rates(old, new, step)


def _check_past_rates(old: RunConfig, new: RunConfig, step: int) -> None:
    plan = BatchPlan(old.batch, old.data.sequence_length)
    was, now = resolve_schedule(old, plan), resolve_schedule(new, plan)
    if now.total_steps < step:
        raise UserError(
            f"training asks for {now.total_steps} steps in all, but the run has already taken "
            f"{step}; raise training.total_steps (or total_tokens)"
        )
    for taken in range(1, step + 1):
        if was.fraction(taken) != now.fraction(taken):
            raise UserError(
                "schedule or training.total_steps/total_tokens changed so that step "
                f"{taken}, already taken, would have had another learning rate; restore them, or "
                "go back to a checkpoint before that step with run.resume=step-N"
            )


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


def _is_free(key: str) -> bool:
    parts = key.split(".")
    if parts[:2] == ["data", "sources"] and parts[-1] in _PATHS:
        return True
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """A nested description as {dotted key: value}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in items:
        found |= _leaves(inner, f"{path}.{key}" if path else str(key))
    return found


def _check_data(facts: dict[str, Any], fingerprints: dict[str, Any]) -> None:
    for name, known in facts.get("data", {}).items():
        if fingerprints.get(name) != known:
            raise UserError(
                f"the token files of data source {name!r} are not the ones this run was started "
                f"with ({fingerprints.get(name)} instead of {known}); restore them or choose "
                "another run.folder"
            )
