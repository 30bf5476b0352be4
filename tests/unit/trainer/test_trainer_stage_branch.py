"""Branches at the boundary of two stages: allowed differences, and their report."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.lineage import Parent
from allometry.configs.run import RunConfig
from allometry.studies.branches import with_names
from allometry.trainer.state.unchanged import branch_changes, changed_overrides, check_branch

Make = Callable[..., RunConfig]
AT = 6
FROZEN = {"optimizer": {"overrides": [{"roles": "input", "freeze": True}]}}
LONG = {"data": {"sequence_length": 16}, "model": {"rope_theta": 5e4}}


def staged(tiny: Make, *stages: dict[str, Any], **options: Any) -> RunConfig:
    named = [{"name": f"s{number}"} | one for number, one in enumerate(stages)]
    length = ("training.total_steps=null", "training.total_tokens=null")
    return tiny(*length, "schedule={kind: constant}", f"stages={json.dumps(named)}", **options)


def branched(parent: RunConfig, branch: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Return the changes of a branch of ``parent`` at ``AT``, checked as in
    ``allometry branch``."""
    link = Parent.model_validate({"folder": parent.run.folder, "step": AT})
    run = branch.run.model_copy(update={"parent": link})
    named = with_names(parent, branch.model_copy(update={"run": run}))
    assert named.run.parent is not None
    check_branch(parent, named, named.run.parent)
    changes = branch_changes(parent, named, AT, rates=True)
    return {one.key: (one.before, one.after) for one in changes}


def test_a_stage_that_begins_where_the_branch_does_may_be_any(tiny: Make, tmp_path: Path) -> None:
    first, steps = {"steps": AT}, {"steps": 4}
    for parent in (
        staged(tiny, first, steps, folder=tmp_path / "trunk"),
        tiny("schedule={kind: constant}", "training.total_steps=10", "training.total_tokens=null"),
    ):
        said = branched(parent, staged(tiny, first, {**steps, **LONG}))
        assert said["model.rope_theta"] == (10_000.0, 50_000.0)
        assert said["data.sequence_length"][1] == 16
        assert "training.total_steps" not in said, "all stages together are as long"
        said = branched(parent, staged(tiny, first, {"steps": 5, **FROZEN}))
        assert said["optimizer.overrides.0.freeze"] == (None, True)
        assert said["training.total_steps"] == (10, 11)
        with pytest.raises(UserError, match="where that stage has ended"):
            branched(parent, staged(tiny, {**first, **FROZEN}, steps))


def test_a_stage_that_goes_on_is_compared_with_itself(tiny: Make, tmp_path: Path) -> None:
    """It is not compared with the next stage, which the trunk began at that step."""
    parent = staged(tiny, {"steps": AT, **FROZEN}, {"steps": 4, **LONG}, folder=tmp_path / "trunk")
    longer = staged(tiny, {"steps": 8, **FROZEN}, {"steps": 4, **LONG})
    assert branched(parent, longer) == {"training.total_steps": (10, 12)}
    assert changed_overrides(parent, longer, AT) == {}
    other = staged(tiny, {"steps": 8, **FROZEN, **LONG}, {"steps": 4})
    with pytest.raises(UserError, match=r"sequence_length=16 .* cannot change where a run goes"):
        branched(parent, other)


def test_a_refusal_offers_what_stages_can_do(tiny: Make, tmp_path: Path) -> None:
    cosine = {"steps": 9, "schedule": {"kind": "cosine"}}
    parent = staged(tiny, cosine, folder=tmp_path / "trunk")
    with pytest.raises(UserError, match=r"optimizer\.lr of a stage") as caught:
        branched(parent, staged(tiny, {**cosine, "steps": 12}))
    assert "changes=[schedule]" not in str(caught.value)
