"""Configuration of a branch: its trunk's, with changes. Without torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.loader import PRESET, put, read, validate
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree
from allometry.trainer.state.changed import is_possible
from allometry.trainer.state.unchanged import branch_changes, check_branch

_LENGTHS = ("total_steps", "total_tokens")
Change = tuple[str, Any, str]
"""Key of a configuration, its value, and the location where it was written."""


def describe_branch(
    trunk: Tree, step: int, folder: Path, config: str | None, changes: Sequence[Change]
) -> RunConfig:
    """Return the configuration of a run in ``folder`` that starts at ``step`` of the ``trunk``.

    It is the trunk's configuration with the file ``config`` and then ``changes`` on top. A length
    in steps replaces a length in tokens, and vice versa.

    For example, ``describe_branch(trunk_of(run), 1000, run.parent / "decay", None, [])``.

    Raises:
        UserError: the configuration is not valid, or its first ``step`` steps differ from the
            trunk's.
    """
    parent = validate(trunk)
    tree = copy.deepcopy(trunk)
    for name in ("parent", "initial"):
        put(tree, f"run.{name}", None, "the branch")
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
    branch = with_names(parent, validate(tree))
    assert branch.run.parent is not None
    check_branch(parent, branch, branch.run.parent)
    return branch


def with_names(parent: RunConfig, branch: RunConfig) -> RunConfig:
    """Return the branch with all its changes listed in ``run.parent.changes``.

    A schedule that is not listed applies to the complete run, from step 1 on, or from the step at
    which the parent's schedule starts.
    """
    link = branch.run.parent
    assert link is not None
    missing = {
        one.name
        for one in branch_changes(parent, branch, link.step)
        if is_possible(one.key) and not link.may_change(one.key)
    }
    update: dict[str, Any] = {"changes": (*link.changes, *sorted(missing))}
    if not link.may_change("schedule") and branch.schedule == parent.schedule:
        update["schedule_from"] = parent.run.schedule_from
    run = branch.run.model_copy(update={"parent": link.model_copy(update=update)})
    return branch.model_copy(update={"run": run})


def put_length(tree: Tree, key: str, place: str) -> None:
    """Remove the run's length in the other unit, if ``key`` is a length."""
    section, _, name = key.partition(".")
    if section == "training" and name in _LENGTHS:
        put(tree, f"training.{_LENGTHS[1 - _LENGTHS.index(name)]}", None, place)


def trunk_of(folder: Path) -> Tree:
    """Return the configuration in a run's folder, with ``run.folder`` set to the given path.

    Raises:
        UserError: the folder has no configuration, or this version cannot read it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run to branch from; name the folder of one (run.folder)"
        )
    try:
        tree = read(path, recorded=True)
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
