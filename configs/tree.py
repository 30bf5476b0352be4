"""The description of a tree of runs: one trunk, and the runs that branch from its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from allometry.configs.base import Count, PathText, Section
from allometry.configs.errors import ConfigError
from allometry.configs.ladder import LaunchConfig, LocalLaunch, Name
from allometry.configs.loader import PRESET, validate_as
from allometry.configs.paths import expanded
from allometry.configs.renamed import parse
from allometry.configs.source import Tree

TRUNK = "trunk"


class Trunk(Section):
    """The run from which the others branch: a run to train, or an existing run."""

    base: PathText | None = Field(
        None,
        min_length=1,
        description="run to train: preset:NAME, or a YAML file, relative to this file; null: given "
        "by ``run``",
    )
    run: PathText | None = Field(
        None, min_length=1, description="folder of an existing run, instead of ``base``"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="keys of the trunk to override: {training.total_steps: 4000}",
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
    """A run that starts from a checkpoint of another run of the tree."""

    name: Name = Field(description="name of the branch and of its folder, in ``folder``/runs")
    parent: str = Field(
        TRUNK, description="run to branch from: trunk, or the name of an earlier branch"
    )
    at: Count = Field(gt=0, description="step of the parent's checkpoint, which the parent keeps")
    config: PathText | None = Field(
        None,
        min_length=1,
        description="YAML file with the changes of the branch, relative to this file; null: only "
        "``set``",
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="keys of the branch to override: {schedule.kind: wsd}"
    )


class TreeConfig(Section):
    """A trunk and its branches: stable, then decays with other data (arXiv 2404.06395)."""

    kind: Literal["tree"] = "tree"
    folder: PathText = Field(
        min_length=1, description="folder of the tree, which contains its runs"
    )
    trunk: Trunk = Field(description="run from which all branches descend")
    branches: tuple[TreeBranch, ...] = Field(
        min_length=1, description="branches, each after its parent"
    )
    launch: LaunchConfig = Field(
        default_factory=LocalLaunch, description="where and how the runs are started"
    )

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
    """Return the tree in a YAML file, and the place of each key.

    File paths become relative to the working directory.

    Raises:
        ConfigError: one sentence with file, line and key.
    """
    file = Path(expanded(str(path)))
    source = parse(file, "tree")
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
