"""Branch a run: take over the checkpoint and the record of another run.

A branch is a complete run in its own folder, as if it had taken the first steps itself: with equal
configs, a branch and a run without a parent are bit-identical.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.lineage import Parent
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.trainer.state import checkpoint
from allometry.trainer.state.changed import Difference
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.identity import stranger
from allometry.trainer.state.integrity import SHARD_SUFFIX, damage
from allometry.trainer.state.pins import pin
from allometry.trainer.state.unchanged import branch_changes, check_branch


@dataclass(frozen=True)
class Taken:
    """A checkpoint of another run, linked into the new run's folder at ``path``, and its facts.

    ``copies`` are (source, target) pairs of shards that could not be linked because the other run
    is on another file system. ``changes`` are the config differences of the new run from this step
    on. ``tokenizer`` is a tokenizer.json to be kept, if any.
    """

    path: Path
    facts: dict[str, Any]
    copies: tuple[tuple[Path, Path], ...]
    changes: tuple[Difference, ...] = ()
    tokenizer: Path | None = None


def take(
    folder: RunFolder,
    config: RunConfig,
    parent: Parent,
    check: Callable[[dict[str, Any]], None],
) -> Taken:
    """Link the parent's checkpoint into the new ``folder``.

    The parent may be training: its checkpoint is taken over completely or not at all, and outlives
    its removal by the parent. ``check`` receives the checkpoint's facts before anything is written.
    Contents are not read; the caller continues with ``copy_share``, and with ``keep`` or
    ``discard``.

    Raises:
        UserError: the checkpoint or some of its files are missing, or this run's first steps would
            differ from the parent's.
    """
    source = RunFolder(parent.folder)
    if source.path.resolve() == folder.path.resolve():
        raise UserError(
            f"run.parent.folder={parent.folder} is the run's own folder; choose another run.folder"
        )
    if source.is_new():
        raise UserError(
            f"run.parent.folder={parent.folder} holds no run; train it or leave run.parent out"
        )
    path = source.checkpoints / f"step-{parent.step}"
    there = checkpoint.saved(source)
    if path not in there:
        names = ", ".join(other.name for other in there) or "none"
        raise UserError(
            f"run.parent.step={parent.step}: {parent.folder} has no such checkpoint; it has "
            f"{names}, and keeps what checkpoint.keep_steps names"
        )
    before = stored_config(source)
    check_branch(before, config, parent)
    partial = folder.checkpoints / f".{path.name}.partial"
    try:
        facts = checkpoint.read_facts(path)
    except (OSError, ValueError):
        raise discard(partial, parent, "trainer.json cannot be read") from None
    check(facts)
    for left in (partial, folder.checkpoints / path.name):  # left by an interrupted launch
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    copies: tuple[tuple[Path, Path], ...] = ()
    try:
        copies = link_files(path, partial)
        problem = damage(path if copies else partial, contents=False)
        problem = problem or stranger(source, path, parent.step)
    except FileNotFoundError:
        problem = "it was removed meanwhile"
    if problem is not None:
        raise discard(partial, parent, problem)
    return Taken(partial, facts, copies, branch_changes(before, config, parent.step, rates=True))


def copy_share(copies: Sequence[tuple[Path, Path]], rank: int, world_size: int) -> None:
    """Copy this rank's share of the files that could not be linked.

    A file that the parent has removed meanwhile is skipped; the check of contents reports it.
    """
    for file, to in copies[rank::world_size]:
        with suppress(FileNotFoundError):
            shutil.copyfile(file, to)


def keep(folder: RunFolder, parent: Parent, partial: Path) -> Path:
    """Rename the linked checkpoint, copy the parent's rows, and return the checkpoint's path.

    The checkpoint is pinned in the parent's folder, if that is writable, so that the parent keeps
    it as long as the branch exists.
    """
    source = RunFolder(parent.folder)
    with suppress(OSError):  # another user's run: the branch has links or copies
        pin(source.path, parent.step, folder.path)
    for name in ("metrics", "loads", "plans", "scores"):
        rows: Path = getattr(source, name)
        if rows.exists():
            write_atomically(getattr(folder, name), rows.read_text(encoding="utf-8"))
    folder.forget_after(parent.step)
    return settle(folder, partial, parent.step)


def settle(folder: RunFolder, partial: Path, step: int) -> Path:
    """Rename a checkpoint that was linked into the folder to ``step-N``, and return its path."""
    path = folder.checkpoints / f"step-{step}"
    partial.rename(path)
    write_atomically(folder.latest, path.name + "\n")
    return path


def discard(partial: Path, parent: Parent, problem: str) -> UserError:
    """Remove the files that ``take`` linked; return the error about the parent's checkpoint."""
    shutil.rmtree(partial, ignore_errors=True)
    path = RunFolder(parent.folder).checkpoints / f"step-{parent.step}"
    return UserError(
        f"checkpoint {path} cannot be branched from ({problem}); choose another run.parent.step, "
        f"or let {parent.folder} keep it: checkpoint.keep_steps=[{parent.step}]"
    )


def stored_config(folder: RunFolder) -> RunConfig:
    """Return the config stored in a run's folder.

    Raises:
        UserError: this version cannot read the config.
    """
    try:
        return load(folder.config, recorded=True)
    except ConfigError as error:
        raise UserError(
            f"{folder.config} was written by another version ({error}); choose another run.folder"
        ) from None


def link_files(path: Path, to: Path, but: Sequence[str] = ()) -> tuple[tuple[Path, Path], ...]:
    """Link a checkpoint's files, except ``but``, into ``to``; return (source, target) to be copied.

    Raises FileNotFoundError if the checkpoint was removed meanwhile.
    """
    files = [file for file in sorted(path.iterdir()) if file.name not in but]
    return tuple((file, to / file.name) for file in files if not _linked(file, to / file.name))


def _linked(file: Path, to: Path) -> bool:
    """Link a file, or copy a small file; return False for a shard that must be copied later."""
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without hard links
        if file.suffix == SHARD_SUFFIX:
            return False
        shutil.copyfile(file, to)
    return True
