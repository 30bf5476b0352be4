"""The description of a run that branches: its trunk's, with what it has otherwise; no torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.loader import PRESET, put, read, validate
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree
from allometry.trainer.state.unchanged import check_branch

_LENGTHS = ("total_steps", "total_tokens")
Change = tuple[str, Any, str]
"""A key of a run, its value, and where that was written."""


def describe_branch(
    trunk: Tree, step: int, folder: Path, config: str | None, changes: Sequence[Change]
) -> RunConfig:
    """Return the description of a run in ``folder`` that begins at ``step`` of the ``trunk``.

    It is the trunk's with the file ``config`` and then ``changes`` on top. A length in steps
    replaces one in tokens, and the other way round.

    Raises:
        UserError: it is no description of a run, or its first ``step`` steps are not the trunk's.
    """
    parent = validate(trunk)
    tree = copy.deepcopy(trunk)
    put(tree, "run.parent", None, "the branch")
    if config is not None:
        tree = _overlay(tree, config)
    for key, value, place in changes:
        put_length(tree, key, place)
        put(tree, key, value, place)
    section = tree.data["run"]
    stated = section.get("parent") if isinstance(section, dict) else None
    link = (stated if isinstance(stated, dict) else {}) | {
        "folder": parent.run.folder,
        "step": step,
    }
    for name, is_so in (("folder", str(folder)), ("parent", link), ("resume", "auto")):
        put(tree, f"run.{name}", is_so, "the branch")
    branch = validate(tree)
    check_branch(parent, branch, step)
    return branch


def put_length(tree: Tree, key: str, place: str) -> None:
    """Take the run's length in the other unit away, where ``key`` gives one."""
    section, _, name = key.partition(".")
    if section == "training" and name in _LENGTHS:
        put(tree, f"training.{_LENGTHS[1 - _LENGTHS.index(name)]}", None, place)


def trunk_of(folder: Path) -> Tree:
    """Return the description that a run's folder holds, under the path that it was named by.

    Raises:
        UserError: it holds none, or this version cannot read it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run to branch from; name the folder of one (run.folder)"
        )
    try:
        tree = read(path)
        put(tree, "run.folder", str(folder), str(path))
        validate(tree)
    except ConfigError as error:
        raise UserError(
            f"{path} was written by another version ({error}); branch from another run"
        ) from None
    return tree


def _overlay(tree: Tree, config: str) -> Tree:
    if config.startswith(PRESET):
        raise UserError(f"{config} is a whole run; give a file of what the branch has otherwise")
    top = read(config)
    training = top.data.get("training")
    for key in training if isinstance(training, dict) else ():
        put_length(tree, f"training.{key}", config)
    return tree.overlay(top)
