"""Plans of run trees: parents, kept checkpoints, and refusals."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.loader import dump, load
from allometry.configs.run import RunConfig
from allometry.configs.tree import load_tree
from allometry.studies.ladder.sbatch import write_scripts
from allometry.studies.tree import TreePlan, plan_tree
from fake_runs import fake_run

STABLE = {"schedule": {"kind": "constant", "warmup_steps": 3}}
DECAY = {"schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3}}
SHORT = DECAY | {"training.total_steps": 10}
BRANCHES = [
    {"name": "short", "at": 7, "set": SHORT},
    {"name": "long", "at": 14, "set": DECAY},
    {"name": "twig", "parent": "long", "at": 16, "set": {"evaluation.sequences_per_source": 2}},
]
Plan = Callable[..., TreePlan]


@pytest.fixture
def plan(tiny: Callable[..., RunConfig], tmp_path: Path) -> Plan:
    tiny()

    def make(**keys: Any) -> TreePlan:
        described = {
            "kind": "tree",
            "folder": str(tmp_path / "tree"),
            "trunk": {"base": "tiny.yaml", "set": STABLE},
            "branches": BRANCHES,
        }
        path = tmp_path / "tree.yaml"
        path.write_text(json.dumps(described | keys))
        return plan_tree(*load_tree(path))

    return make


def test_each_run_keeps_what_branches_from_it(plan: Plan, tmp_path: Path) -> None:
    trunk, short, long, twig = plan().runs
    assert trunk.config.checkpoint.keep_steps == (7, 14)
    assert long.config.checkpoint.keep_steps == (16,)
    assert short.config.checkpoint.keep_steps == ()
    assert [(one.parent, one.parent_step, one.steps) for one in (short, long, twig)] == [
        ("trunk", 7, 10),
        ("trunk", 14, 20),
        ("long", 16, 20),
    ]
    assert twig.config.run.parent is not None
    assert twig.config.run.parent.folder == str(tmp_path / "tree/runs/long")
    assert twig.config.schedule == long.config.schedule, "a branch of a branch has its description"
    assert twig.own_flops * 5 == twig.flops


def test_a_file_beside_the_tree(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "decay.yaml").write_text(json.dumps(DECAY | {"training": {"total_tokens": 6400}}))
    _, run = plan(branches=[{"name": "a", "at": 14, "config": "decay.yaml"}]).runs
    assert (run.steps, run.config.schedule.kind) == (25, "wsd")
    _, run = plan(
        branches=[
            {"name": "a", "at": 14, "config": "decay.yaml", "set": {"training.total_steps": 21}}
        ]
    ).runs
    assert run.steps == 21


def test_a_trunk_that_there_is(plan: Plan, tmp_path: Path) -> None:
    fake_run(tmp_path / "old")
    trunk = {"run": str(tmp_path / "old")}
    more = {"schedule": {"kind": "cosine", "warmup_steps": 4}}
    branches = [{"name": "a", "at": 30, "set": more}]
    with pytest.raises(UserError, match=r"old has no checkpoint of step 30; it has those of no st"):
        plan(trunk=trunk, branches=branches)
    (tmp_path / "old/checkpoints/step-30").mkdir(parents=True)
    (tmp_path / "old/checkpoints/step-30/complete.json").touch()
    planned = plan(trunk=trunk, branches=branches)
    assert planned.trunk == tmp_path / "old"
    (run,) = planned.runs
    assert (run.parent, run.parent_step) == (None, 30)
    assert run.config.run.parent is not None
    assert run.config.run.parent.folder == str(tmp_path / "old")


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"kind": "ladder"}, "does not describe a tree of runs"),
    ({"branches": []}, "branches is empty"),
    ({"trunk": {}}, "give exactly one of base"),
    ({"trunk": {"run": "old", "set": STABLE}}, "set changes a run that is to be trained"),
    ({"branches": [BRANCHES[2]]}, "twig branches from long, which is none of the runs before it"),
    ({"branches": [BRANCHES[0], BRANCHES[0]]}, "short is the name of two runs"),
    ({"branches": [{"name": "a", "at": 7, "st": {}}]}, "did you mean 'set'"),
    ({"branches": [{"name": "a/b", "at": 7}]}, "is not valid"),
    (
        {"branches": [{"name": "a", "at": 7, "set": {"model.width": 64}}]},
        "branch a of the tree: mo",
    ),
    ({"branches": [{"name": "a", "at": 7, "set": {"model.wdth": 64}}]}, r"tree.yaml:1: model.wdth"),
    ({"branches": [{"name": "a", "at": 7, "config": "absent.yaml"}]}, "absent.yaml does not exist"),
    (
        {"branches": [{"name": "a", "at": 30, "set": {"training.total_steps": 40}}]},
        "at=30 is past the 20 steps of trunk",
    ),
    (
        {"branches": [{"name": "a", "at": 7, "set": DECAY | {"training.total_steps": 8}}]},
        "gave step 7 another learning rate",
    ),
    ({"launch": {"processes": 3}}, "cannot be divided by hdp=3"),
)


@pytest.mark.parametrize(("keys", "sentence"), REFUSED)
def test_refused(plan: Plan, keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as refused:
        plan(**keys)
    assert "\n" not in str(refused.value)


def test_scripts_for_slurm_wait_for_what_they_branch_from(plan: Plan, tmp_path: Path) -> None:
    launch = {"kind": "sbatch", "processes": 4, "options": ["--gres=gpu:8"]}
    planned = plan(launch=launch)
    assert planned.processes == 4
    submit, *scripts = write_scripts(planned, planned.runs)
    assert [path.stem for path in scripts] == ["trunk", "short", "long", "twig"]
    for path in (submit, *scripts):
        done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "#SBATCH --gres=gpu:8\n" in scripts[0].read_text()
    assert "what is missing later, allometry branch --tree writes anew" in submit.read_text()
    described = load(tmp_path / "tree/configs/twig.yaml")
    assert described.run.parent is not None
    assert described.run.parent.step == 16
    # A substitute for sbatch records its arguments.
    fake, calls = tmp_path / "bin", tmp_path / "calls"
    fake.mkdir()
    (fake / "sbatch").write_text('#!/bin/bash\necho "$@" >> "$CALLS"\nwc -l < "$CALLS"\n')
    (fake / "sbatch").chmod(0o755)
    environment = {"PATH": f"{fake}:/usr/bin:/bin", "CALLS": str(calls)}
    done = subprocess.run([submit], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    after = "--parsable --dependency=afterok:{} --kill-on-invalid-dep=yes {}.sbatch"
    assert calls.read_text().splitlines() == [
        "--parsable trunk.sbatch",
        after.format(1, "short"),
        after.format(1, "long"),
        after.format(3, "twig"),
    ]
    # A finished trunk needs no job, and its branches do not wait.
    trunk = planned.runs[0]
    trunk.folder.mkdir(parents=True)
    (trunk.folder / "config.yaml").write_text(dump(trunk.config))
    (trunk.folder / "metrics.jsonl").write_text('{"step": 20}\n')
    (trunk.folder / "events.jsonl").write_text('{"event": "finished", "step": 20}\n')
    for step in (7, 14):
        (trunk.folder / f"checkpoints/step-{step}").mkdir(parents=True)
        (trunk.folder / f"checkpoints/step-{step}/complete.json").touch()
    submit, *scripts = write_scripts(planned, planned.runs)
    assert [path.stem for path in scripts] == ["short", "long", "twig"]
    assert "--dependency" not in submit.read_text().split("short: job")[0]


def test_a_branch_of_a_tree_says_what_it_changes(plan: Plan, tmp_path: Path) -> None:
    """Keys in ``set`` are declared automatically; a changed schedule is not."""
    more = {"optimizer.lr": 0.002, "data.sources.1.weight": 0.5, "training.clip_grad_norm": None}
    own = DECAY | {"run.parent.changes": ["schedule"]}
    again = {"schedule.warmup_steps": 0, "run.parent.changes": ["schedule", "optimizer"]}
    _, short, long, twig, new = plan(
        branches=[
            {"name": "short", "at": 7, "set": SHORT | more},
            {"name": "long", "at": 7, "set": own},
            {"name": "twig", "parent": "long", "at": 9},
            {"name": "new", "parent": "long", "at": 9, "set": again | {"optimizer.lr": 0.001}},
        ]
    ).runs
    links = [run.config.run.parent for run in (short, long, twig, new)]
    assert [link and (link.changes, link.schedule_from) for link in links] == [
        (("data", "optimizer.lr", "training.clip_grad_norm"), 0),
        (("schedule",), 0),
        ((), 7),
        (("schedule", "optimizer"), 0),
    ]
    assert [run.config.run.schedule_from for run in (short, long, twig, new)] == [0, 7, 7, 9]
