"""Identity of a run, drawn once, stored in run.json and in each ``complete.json`` of the run.

The identity moves with the folder: a copied or renamed run continues as the same run. A branch has
its own identity, and records the identity of the run whose checkpoint it begins with. Folders and
checkpoints from before identities existed have no identity and are not compared.
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
    """Identity ``run``; of a branch also its parent's identity and the ``step`` of the branch."""

    run: str
    parent: str | None = None
    step: int | None = None

    @classmethod
    def new(cls) -> Identity:
        """Draw a random identity."""
        return cls(uuid.uuid4().hex[:16])

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Identity | None:
        """Return the identity in run.json, None if it has no identity."""
        said = record.get(KEY)
        if not isinstance(said, dict) or not isinstance(said.get("run"), str):
            return None
        return cls(said["run"], said.get("parent"), said.get("step"))

    def describe(self) -> dict[str, Any]:
        """Return the entry for run.json."""
        return {KEY: self._asdict()}


def run_of(path: Path) -> str | None:
    """Return the identity of the run that wrote a checkpoint; None if missing or unreadable."""
    try:
        said = read_object(path / COMPLETE).get("run")
    except (OSError, ValueError):
        return None
    return said if isinstance(said, str) else None


def stranger(folder: RunFolder, path: Path, step: int | None) -> str | None:
    """Return in words that the checkpoint of ``step`` belongs to another run, None if it does not.

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
    """Describe a checkpoint's damage or its origin from another run; None for a valid checkpoint.

    ``contents``: see ``damage``.
    """
    return damage(path, contents=contents) or stranger(folder, path, step_named(path))


def identity_for(folder: RunFolder, path: Path | None, step: int, branched: bool) -> Identity:
    """Return the recorded identity of a run that begins or continues at ``path``, or a new one.

    ``branched``: the checkpoint is that of the run's parent.
    """
    recorded = Identity.of_record(folder.recorded())
    if recorded is not None:
        return recorded
    theirs = None if path is None else run_of(path)
    if branched:
        return Identity.new()._replace(parent=theirs, step=step)
    return Identity(theirs) if theirs is not None else Identity.new()  # run.json was lost
