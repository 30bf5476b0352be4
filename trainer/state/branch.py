"""A run that begins where another one stands: its checkpoint and its record become this run's own.

The branch is then a run like any other, complete in its folder, as if it had taken the first steps
itself: of equal descriptions, a branch and a run without a parent end in the same bits.
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
    """A checkpoint of another run in the new run's folder: ``path``, and its facts.

    ``copies``, from and to: shards that could not be linked, as the other run is on another disk.
    ``changes``: what the new run has otherwise from there on. ``tokenizer``: one to be kept.
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

    The parent may be training: its checkpoint is taken over as a whole or not at all, and stays
    when the parent forgets its own. ``check`` gets the checkpoint's facts before anything is
    written. Contents are not read: then come ``copy_share``, and ``keep`` or ``discard``.

    Raises:
        UserError: there is no such checkpoint or files of it are missing, or the parent's first
            steps are not what this run's would have been.
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
    for left in (partial, folder.checkpoints / path.name):  # of a launch that ended in between
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
    """Copy what could not be linked, each of the ranks its share.

    A file that the parent has removed meanwhile is left out, which a check of contents notices.
    """
    for file, to in copies[rank::world_size]:
        with suppress(FileNotFoundError):
            shutil.copyfile(file, to)


def keep(folder: RunFolder, parent: Parent, partial: Path) -> Path:
    """Give what ``take`` linked its name, and the folder the parent's rows; where it is now.

    The parent, if its folder can be written, keeps its own as long as the branch is there.
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
    """Give a checkpoint that was linked into the folder its name; where it is now."""
    path = folder.checkpoints / f"step-{step}"
    partial.rename(path)
    write_atomically(folder.latest, path.name + "\n")
    return path


def discard(partial: Path, parent: Parent, problem: str) -> UserError:
    """Remove what ``take`` linked; the refusal of the parent's checkpoint."""
    shutil.rmtree(partial, ignore_errors=True)
    path = RunFolder(parent.folder).checkpoints / f"step-{parent.step}"
    return UserError(
        f"checkpoint {path} cannot be branched from ({problem}); choose another run.parent.step, "
        f"or let {parent.folder} keep it: checkpoint.keep_steps=[{parent.step}]"
    )


def stored_config(folder: RunFolder) -> RunConfig:
    """The description that a run's folder holds.

    Raises:
        UserError: this version cannot read it.
    """
    try:
        return load(folder.config)
    except ConfigError as error:
        raise UserError(
            f"{folder.config} was written by another version ({error}); choose another run.folder"
        ) from None


def link_files(path: Path, to: Path, but: Sequence[str] = ()) -> tuple[tuple[Path, Path], ...]:
    """Link the files of a checkpoint into the folder ``to``; from and to of what is to be copied.

    Raises FileNotFoundError: it was removed meanwhile.
    """
    files = [file for file in sorted(path.iterdir()) if file.name not in but]
    return tuple((file, to / file.name) for file in files if not _linked(file, to / file.name))


def _linked(file: Path, to: Path) -> bool:
    """Link a file, or copy a small one; False for a shard that is to be copied."""
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        if file.suffix == SHARD_SUFFIX:
            return False
        shutil.copyfile(file, to)
    return True
