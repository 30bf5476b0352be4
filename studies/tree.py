"""Trees of runs: the runs of a trunk and its branches. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.ladder import LocalLaunch, SbatchLaunch
from allometry.configs.loader import dump, put, read, validate
from allometry.configs.run import RunConfig
from allometry.configs.source import Tree
from allometry.configs.tree import TRUNK, TreeBranch, TreeConfig
from allometry.scaling.plan import RunPlan
from allometry.studies.branches import Change, describe_branch, put_length, trunk_of
from allometry.studies.ladder.share import PlannedRun
from allometry.trainer.state.folder import write_atomically
from allometry.trainer.state.pins import DESCRIBED, pin


@dataclass(frozen=True)
class TreePlan:
    """The runs of a tree, each after the run from which it branches.

    ``trunk``: the folder of the trunk, if the trunk is not a run of the tree.
    """

    tree: TreeConfig
    runs: tuple[PlannedRun, ...]
    trunk: Path | None

    @property
    def folder(self) -> Path:
        """Folder of the tree."""
        return Path(self.tree.folder)

    @property
    def launch(self) -> LocalLaunch | SbatchLaunch:
        """Launch section of the runs."""
        return self.tree.launch

    @property
    def processes(self) -> int:
        """Ranks per run."""
        return self.launch.processes


def plan_tree(tree: TreeConfig, source: Tree) -> TreePlan:
    """Return the runs that the tree describes; ``source`` has the locations of its keys.

    Each run keeps the checkpoints from which others branch. Raises UserError: a run's configuration
    is not valid, or a run cannot branch at its step. For example,
    ``plan_tree(*load_tree("tree.yaml")).runs``.
    """
    outside = None if tree.trunk.run is None else Path(tree.trunk.run)
    described = {TRUNK: _trunk(tree, source) if outside is None else trunk_of(outside)}
    runs: dict[str, PlannedRun] = {}
    if outside is None:
        runs[TRUNK] = _planned(TRUNK, described[TRUNK], tree)
    for number, branch in enumerate(tree.branches):
        parent = runs.get(branch.parent)
        if parent is not None and branch.at > parent.steps:
            raise UserError(
                f"branch {branch.name} of the tree: at={branch.at} is past the {parent.steps} "
                f"steps of {branch.parent}; branch earlier or make that run longer"
            )
        try:
            config = _branch(tree, source, number, described[branch.parent])
        except ConfigError:
            raise  # the message names file and line
        except UserError as error:
            raise UserError(f"branch {branch.name} of the tree: {error}") from None
        described[branch.name] = Tree(config.model_dump(mode="json"))
        run = _planned(branch.name, described[branch.name], tree)
        if parent is not None:
            _keep(runs, branch)
            run = replace(run, parent=branch.parent)
        elif not (run.folder / "config.yaml").is_file():
            _check_kept(outside or Path(), branch)
        runs[branch.name] = replace(run, parent_step=branch.at)
    return TreePlan(tree, tuple(runs.values()), outside)


def write_branch(config: RunConfig) -> tuple[Path, bool]:
    """Write the configuration of a branch into its folder, and pin the trunk's checkpoint.

    Returns the configuration's path, for ``allometry train``, and True if the checkpoint was
    pinned: the trunk's folder may belong to another user, or not exist yet.

    Raises:
        UserError: the branch's folder cannot be written.
    """
    folder, parent = Path(config.run.folder), config.run.parent
    assert parent is not None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DESCRIBED, dump(config))
    except OSError as error:
        raise UserError(
            f"run.folder={folder} cannot be written ({error.strerror}); choose another"
        ) from None
    try:
        pin(Path(parent.folder), parent.step, folder)
    except OSError:
        return folder / DESCRIBED, False
    return folder / DESCRIBED, True


def _trunk(tree: TreeConfig, source: Tree) -> Tree:
    assert tree.trunk.base is not None
    described = read(tree.trunk.base)
    place = source.where(("trunk", "set"))
    for key, value in tree.trunk.set.items():
        put_length(described, key, place)
        put(described, key, value, place)
    put(described, "run.folder", str(_folder(tree, TRUNK)), place)
    return described


def _branch(tree: TreeConfig, source: Tree, number: int, parent: Tree) -> RunConfig:
    branch = tree.branches[number]
    place = source.where(("branches", number, "set"))
    changes: list[Change] = [(key, value, place) for key, value in branch.set.items()]
    folder = _folder(tree, branch.name)
    config = describe_branch(parent, branch.at, folder, branch.config, changes)
    RunPlan.of(config, tree.launch.processes)  # raises if ranks cannot share the batch
    return config


def _planned(name: str, described: Tree, tree: TreeConfig) -> PlannedRun:
    config = validate(described)
    plan = RunPlan.of(config, tree.launch.processes)
    return PlannedRun(
        name=name,
        is_target=False,
        size="",
        schedule=config.schedule.kind,
        config=config,
        steps=plan.total_steps,
        tokens=plan.total_tokens,
        parameters=plan.parameters.total,
        flops=plan.total_flops,
        of="tree",
    )


def _folder(tree: TreeConfig, name: str) -> Path:
    return Path(tree.folder) / "runs" / name


def _keep(runs: dict[str, PlannedRun], branch: TreeBranch) -> None:
    """Add the step to the checkpoints that the parent, a run of the tree, keeps."""
    parent = runs[branch.parent]
    checkpoint = parent.config.checkpoint
    kept = tuple(sorted({*checkpoint.keep_steps, branch.at}))
    config = parent.config.model_copy(
        update={"checkpoint": checkpoint.model_copy(update={"keep_steps": kept})}
    )
    runs[branch.parent] = replace(parent, config=config)


def _check_kept(trunk: Path, branch: TreeBranch) -> None:
    path = trunk / "checkpoints"
    if not (path / f"step-{branch.at}" / "complete.json").is_file():
        there = sorted(int(one.parent.name[5:]) for one in path.glob("step-*/complete.json"))
        raise UserError(
            f"branch {branch.name} of the tree: {trunk} has no checkpoint of step {branch.at}; it "
            f"has those of {', '.join(map(str, there)) or 'no step'}, and keeps what "
            "checkpoint.keep_steps names"
        )
