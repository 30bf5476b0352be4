"""Trees of runs as planned: who branches from whom, what is kept, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.configs.tree import load_tree
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
