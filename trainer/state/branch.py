"""A run that begins where another one stands: its checkpoint and its record become this run's own.

The branch is then a run like any other, complete in its folder, as if it had taken the first steps
itself: of equal descriptions, a branch and a run without a parent end in the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.execution import Parent
from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.unchanged import check_branch


def branch(
    folder: RunFolder,
    config: RunConfig,
    parent: Parent,
    check: Callable[[dict[str, Any]], None],
) -> Path:
    """Give the new ``folder`` the parent's checkpoint and rows; where the checkpoint is now.

    The parent may be training: its checkpoint is taken over as a whole or not at all. ``check``
    gets the checkpoint's facts before anything is written.

    Raises:
        UserError: there is no such checkpoint or it is damaged, or the parent's first steps are
            not what this run's would have been.
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
    path = _find(source, parent)
    check_branch(stored_config(source), config, parent.step)
    check(_facts(path, parent))
    taken = _take(path, folder, parent)
    for name in ("metrics", "loads", "plans"):
        rows: Path = getattr(source, name)
        if rows.exists():
            write_atomically(getattr(folder, name), rows.read_text(encoding="utf-8"))
    folder.forget_after(parent.step)
    write_atomically(folder.latest, taken.name + "\n")
    return taken


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


def _find(source: RunFolder, parent: Parent) -> Path:
    path = source.checkpoints / f"step-{parent.step}"
    there = checkpoint.saved(source)
    if path not in there:
        names = ", ".join(found.name for found in there) or "none"
        raise UserError(
            f"run.parent.step={parent.step}: {parent.folder} has no such checkpoint; it has "
            f"{names}, and keeps what checkpoint.keep_steps names"
        )
    return path


def _facts(path: Path, parent: Parent) -> dict[str, Any]:
    try:
        return checkpoint.read_facts(path)
    except (OSError, ValueError):
        raise _damaged(path, parent, "trainer.json cannot be read") from None


def _take(path: Path, folder: RunFolder, parent: Parent) -> Path:
    """Link (or copy, to another disk) a checkpoint into ``folder``, and read all of it once.

    A file that has been linked stays when the parent forgets its own.
    """
    partial = folder.checkpoints / f".{path.name}.partial"
    final = folder.checkpoints / path.name
    for left in (partial, final):  # of a launch that ended before the run's config.yaml was written
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in sorted(path.iterdir()):
            _link(file, partial / file.name)
        problem = checkpoint.damage(partial, contents=True)
    except FileNotFoundError:
        problem = "it was removed meanwhile"
    if problem is not None:
        shutil.rmtree(partial, ignore_errors=True)
        raise _damaged(path, parent, problem)
    partial.rename(final)
    return final


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, to)


def _damaged(path: Path, parent: Parent, problem: str) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be branched from ({problem}); choose another run.parent.step, "
        f"or let {parent.folder} keep it: checkpoint.keep_steps=[{parent.step}]"
    )
