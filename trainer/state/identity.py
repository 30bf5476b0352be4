"""Which run a checkpoint is of: an identity that is drawn once, kept in run.json and in each
``complete.json`` of the run.

It goes where the folder goes: a copy of a run, or one under another name, goes on as the run. A
branch has an identity of its own, and knows that of the run whose checkpoint it begins with.
Folders and checkpoints of before there were identities have none, and are not compared.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from allometry.configs.json_file import read_object
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.integrity import COMPLETE, damage, step_named

KEY = "identity"


class Identity(NamedTuple):
    """``run`` is the run's own; ``parent`` that of its checkpoint of ``step``, if it branched."""

    run: str
    parent: str | None = None
    step: int | None = None

    @classmethod
    def new(cls) -> Identity:
        """Draw one."""
        return cls(uuid.uuid4().hex[:16])

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Identity | None:
        """Return what run.json says; None: nothing."""
        said = record.get(KEY)
        if not isinstance(said, dict) or not isinstance(said.get("run"), str):
            return None
        return cls(said["run"], said.get("parent"), said.get("step"))

    def describe(self) -> dict[str, Any]:
        """Return it for run.json."""
        return {KEY: self._asdict()}


def run_of(path: Path) -> str | None:
    """The identity of the run that wrote a checkpoint; None: it has none, or cannot be read."""
    try:
        said = read_object(path / COMPLETE).get("run")
    except (OSError, ValueError):
        return None
    return said if isinstance(said, str) else None


def stranger(folder: RunFolder, path: Path, step: int | None) -> str | None:
    """In a few words, that the checkpoint ``path`` of ``step`` is another run's; None: it is not.

    Raises:
        UserError: run.json of ``folder`` cannot be read.
    """
    theirs = run_of(path)
    if theirs is None or not folder.run.exists():
        return None
    own = Identity.of_record(folder.recorded())
    if own is None:
        return f"it was written by another run, {theirs}"
    if theirs == own.run or (theirs, step) == (own.parent, own.step):
        return None
    return f"it was written by another run, {theirs}, and this one is {own.run}"


def problem_of(folder: RunFolder, path: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint of the run in ``folder``: damage, or that it is not its own.

    ``contents``: see ``damage``.
    """
    return damage(path, contents=contents) or stranger(folder, path, step_named(path))


def identity_for(folder: RunFolder, path: Path | None, step: int, branched: bool) -> Identity:
    """The identity of a run that goes on, or begins, at ``path``: the recorded one or a new one.

    ``branched``: the checkpoint is that of the run it branches from.
    """
    recorded = Identity.of_record(folder.recorded())
    if recorded is not None:
        return recorded
    theirs = None if path is None else run_of(path)
    if branched:
        return Identity.new()._replace(parent=theirs, step=step)
    return Identity(theirs) if theirs is not None else Identity.new()  # run.json was lost
