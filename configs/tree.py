"""The description of a tree: one trunk, and the runs that branch from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section
from allometry.configs.errors import ConfigError
from allometry.configs.ladder import LaunchConfig, LocalLaunch, Name
from allometry.configs.loader import PRESET, validate_as
from allometry.configs.paths import expanded
from allometry.configs.source import Tree, parse_file

TRUNK = "trunk"


class Trunk(Section):
    """The run that the others branch from: one to be trained, or one that there is."""

    base: PathText | None = Field(
        None, min_length=1, description="a run: YAML file, beside this one, or preset:NAME"
    )
    run: PathText | None = Field(
        None, min_length=1, description="instead of ``base``: the folder of a run that there is"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of the trunk: {training.total_steps: 4000}"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.base is None) == (self.run is None):
            raise ValueError("give exactly one of base, a run to train, and run, one that there is")
        if self.run is not None and self.set:
            raise ValueError(
                f"set changes a run that is to be trained, and run={self.run} is there"
            )
        return self


class TreeBranch(Section):
    """A run that begins at a checkpoint of another one of the tree."""

    name: Name = Field(description="its folder, in ``folder``/runs")
    parent: str = Field(TRUNK, description="trunk, or the name of another branch")
    at: Count = Field(gt=0, description="step of the parent's checkpoint, which the parent keeps")
    config: PathText | None = Field(
        None, min_length=1, description="YAML file, beside this one, of what it has otherwise"
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of the branch: {schedule.kind: wsd}"
    )


class TreeConfig(Section):
    """A trunk and its branches: stable, then decays with other data (arXiv 2404.06395)."""

    kind: Literal["tree"] = "tree"
    folder: PathText = Field(min_length=1, description="the tree's folder, which holds its runs")
    trunk: Trunk = Field(description="the run that all of them begin with")
    branches: tuple[TreeBranch, ...] = Field(min_length=1, description="what branches from it")
    launch: LaunchConfig = Field(default_factory=LocalLaunch, description="where runs run")

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = [TRUNK]
        for branch in self.branches:
            if branch.name in known:
                raise ValueError(f"branches: {branch.name} is the name of two runs; rename one")
            if branch.parent not in known:
                raise ValueError(
                    f"branches: {branch.name} branches from {branch.parent}, which is none of the "
                    f"runs before it ({', '.join(known)}); name one of them, or put it first"
                )
            known.append(branch.name)
        return self


def load_tree(path: str | Path) -> tuple[TreeConfig, Tree]:
    """The tree that a YAML file describes, and where its keys were written.

    Paths of files are then from here. Raises ConfigError, one sentence with file, line and key.
    """
    file = Path(expanded(str(path)))
    source = parse_file(file)
    if source.data.get("kind") != "tree":
        raise ConfigError(
            f"{file} does not describe a tree of runs; begin it with 'kind: tree', or give a run "
            "to allometry train"
        )
    tree = validate_as(TreeConfig, source)

    def beside(name: str | None) -> str | None:
        return name if name is None or name.startswith(PRESET) else str(file.parent / name)

    branches = [one.model_copy(update={"config": beside(one.config)}) for one in tree.branches]
    trunk = tree.trunk.model_copy(update={"base": beside(tree.trunk.base)})
    return tree.model_copy(update={"trunk": trunk, "branches": tuple(branches)}), source
