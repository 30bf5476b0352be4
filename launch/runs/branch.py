"""Branches from checkpoints of other runs, and trees of branches: ``allometry branch``."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.format import human
from allometry.configs.ladder import SbatchLaunch
from allometry.configs.loader import load, validate, yaml_text
from allometry.configs.run import RunConfig
from allometry.configs.source import parse_value
from allometry.configs.tree import load_tree
from allometry.launch.command import Report
from allometry.launch.runs.commands import Branch, Train
from allometry.launch.text import table
from allometry.scaling.plan import RunPlan
from allometry.studies.branches import Change, describe_branch, trunk_of
from allometry.studies.ladder.run import train_runs, write_config
from allometry.studies.ladder.sbatch import offer_scripts
from allometry.studies.ladder.state import check_stored, only_one, stated
from allometry.studies.tree import TreePlan, plan_tree, write_branch
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.pins import DESCRIBED
from allometry.trainer.state.unchanged import branch_changes

TREE = "tree.yaml"
Say = Callable[[str], None]
_OF_A_BRANCH = ("run", "at", "config", "sets", "name", "train")
_OF_A_TREE = ("parallel", "dry_run")
_FLAGS = {"run": "RUN", "sets": "--set", "name": "--run"}


def branched(asked: Branch) -> Report:
    """Describe a branch, or train a tree. Raises UserError."""
    of, wrong = ("--tree", _OF_A_BRANCH) if asked.tree else ("a single branch", _OF_A_TREE)
    for name in wrong:
        if getattr(asked, name) not in (None, False, ()):
            flag = _FLAGS.get(name, f"--{name.replace('_', '-')}")
            raise UserError(f"{flag} does not go with {of}; leave it out")
    return _tree(asked) if asked.tree else _single(asked)


def _single(asked: Branch) -> Report:
    if asked.run is None or asked.at is None:
        raise UserError(
            "name the run to branch from and the step of its checkpoint: allometry branch RUN --at "
            "STEP, or a tree of runs: --tree FILE"
        )
    if asked.json and asked.train:
        raise UserError("--json does not go with --train; leave one of them out")
    trunk = trunk_of(asked.run)
    _check_kept(asked.run, asked.at)
    stem = Path(asked.config).stem if asked.config else "branch"
    name = asked.name or f"{asked.run.name}-{stem}-{asked.at}"
    if Path(name).name != name or name == "..":
        raise UserError(
            f"--run={name} is a path, but a branch lies beside its trunk, in {asked.run.parent}; "
            "give a name alone, or set run.folder in --config"
        )
    folder = asked.run.parent / name
    changes = [_change(text) for text in asked.sets]
    config = describe_branch(trunk, asked.at, folder, asked.config, changes)
    _check_free(folder, config)
    plan = RunPlan.of(config, 1)
    path, pinned = write_branch(config)
    _check_kept(asked.run, asked.at)  # again, now that it is pinned
    command = f"allometry train {shlex.quote(str(path))}"
    if asked.train:
        from allometry.launch.runs.train import trained

        return trained(Train(config=str(path)))
    different = branch_changes(validate(trunk), config, asked.at, rates=True)
    facts = {
        "run": str(folder),
        "config": str(path),
        "changes": [change._asdict() for change in different],
        "parent": str(asked.run),
        "step": asked.at,
        "pinned": pinned,
        "total_steps": plan.total_steps,
        "command": command,
    }
    keeps = (
        f"{asked.run} keeps that checkpoint while {folder} is there"
        if pinned
        else f"{asked.run} cannot be written, so it may remove that checkpoint before it is taken"
    )
    own = plan.total_tokens - plan.batch.tokens_after(asked.at)
    return Report(
        facts,
        f"{folder} branches from {asked.run} at step {asked.at} of {plan.total_steps}, with "
        f"{human(own)} tokens to go; {keeps}\n"
        + "".join(f"  {key} is {after}; it was {before}\n" for key, before, after in different)
        + f"train it: {command}",
    )


def _change(text: str) -> Change:
    key, equals, value = text.partition("=")
    place = f"--set {text!r}"
    if not (key and equals):
        raise ConfigError(f"{place}: expected section.key=value")
    return key, parse_value(value, place), place


def _check_kept(run: Path, step: int) -> None:
    from allometry.trainer.state.identity import problem_of  # imports torch

    path = run / "checkpoints" / f"step-{step}"
    problem = problem_of(RunFolder(run), path) if path.is_dir() else "it is not there"
    if problem is not None:
        names = sorted(
            int(one.parent.name[5:]) for one in run.glob("checkpoints/step-*/complete.json")
        )
        raise UserError(
            f"--at={step}: checkpoint {path} cannot be branched from ({problem}); {run} has those "
            f"of {', '.join(map(str, names)) or 'no step'}, and keeps what checkpoint.keep_steps "
            "names"
        )


def _check_free(folder: Path, config: RunConfig) -> None:
    """Raise UserError if the folder has another run, or the description of another run."""
    for name in ("config.yaml", DESCRIBED):
        path = folder / name
        if not path.is_file():
            continue
        try:
            if load(path, recorded=True) == config:
                return
        except ConfigError:
            pass
        raise UserError(f"{folder} holds another run; choose another name with --run")


def _tree(asked: Branch) -> Report:
    assert asked.tree is not None
    inside = Path(asked.tree) / TREE
    plan = plan_tree(*load_tree(inside if inside.is_file() else asked.tree))
    if asked.dry_run:
        return Report(_facts(plan), _text(plan))

    def say(line: str) -> None:
        print(line, file=sys.stderr if asked.json else sys.stdout, flush=True)

    for run in plan.runs:  # before any file is written
        check_stored(run)
    with only_one(plan.folder, "tree"):
        _save(plan)
        for run in plan.runs:
            write_config(plan, run)
            if run.config.run.parent is not None:
                write_branch(run.config)
        if isinstance(plan.launch, SbatchLaunch):
            written = offer_scripts(plan, plan.runs, asked.parallel, say)
            return Report(_facts(plan) | {"scripts": [str(path) for path in written]}, "")
        stopped = _train(plan, asked.parallel or plan.launch.parallel, say)
    code = 128 + signal.Signals[stopped] if stopped else 0  # as in shells
    return Report(_facts(plan) | {"stopped": stopped}, "", passed=not stopped, code=code)


def _train(plan: TreePlan, at_once: int, say: Say) -> str | None:
    """Train the remaining runs of the tree; return the signal that stopped them, or None.

    Raises UserError: runs failed.
    """
    ended = train_runs(plan, plan.runs, at_once, say)
    if ended.failed:
        name, reason = next(iter(ended.failed.items()))
        raise UserError(
            f"{len(ended.failed)} of {len(plan.runs)} runs failed, the first of them {name}: "
            f"{reason}"
        )
    if ended.stopped:
        say(f"stopped by {ended.stopped}; the same command goes on from here")
    return ended.stopped


def _save(plan: TreePlan) -> None:
    """Write the description, with absolute paths, into the tree's folder."""
    plain: dict[str, Any] = plan.tree.model_dump(mode="json")
    for section in (plain["trunk"], *plain["branches"]):
        for key in ("base", "run", "config"):
            if section.get(key) and not section[key].startswith("preset:"):
                section[key] = str(Path(section[key]).resolve())
    (plan.folder / TREE).write_text(yaml_text(plain), encoding="utf-8")


def _facts(plan: TreePlan) -> dict[str, Any]:
    rows = []
    for run in plan.runs:
        state, changed = stated(run)
        parent = run.config.run.parent
        rows.append(
            {
                "run": run.name,
                "folder": str(run.folder),
                "parent": parent.folder if parent else None,
                "parent_step": parent.step if parent else None,
                "state": state.stage,
                "step": state.step,
                "total_steps": run.steps,
                "tokens": run.tokens,
                "own_flops": run.own_flops,
                "loss": state.loss,
                "validation": state.validation,
                "problem": changed,
            }
        )
    return {"folder": str(plan.folder), "runs": rows}


def _text(plan: TreePlan) -> str:
    rows = [("run", "branches from", "state", "step", "tokens", "loss")]
    problems = []
    for run in plan.runs:
        state, problem = stated(run)
        parent = run.config.run.parent
        origin = f"{Path(parent.folder).name}, step {parent.step}" if parent else ""
        step = f"{state.step}/{run.steps}"
        rows.append((run.name, origin, state.stage, step, human(run.tokens), state.loss_text))
        problems += [problem] if problem else []
    return "\n".join([table(rows, right=(3, 4)), *problems])
