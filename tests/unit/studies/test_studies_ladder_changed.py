"""A ladder whose config changed after its runs, or its prediction, were made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.ladder import load_ladder
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.launch.studies.ladder import stages as work
from allometry.launch.studies.ladder.text import planned_facts, prediction_text, status_text
from allometry.laws.ladder import Prediction, save_prediction
from allometry.studies.ladder.plan import LadderPlan, plan_ladder
from allometry.studies.ladder.share import PlannedRun
from allometry.studies.ladder.state import as_stored


@pytest.fixture
def planned(tiny: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., LadderPlan]:
    tiny()

    def plan(**keys: Any) -> LadderPlan:
        described = {
            "kind": "ladder",
            "base": "tiny.yaml",
            "folder": str(tmp_path / "ladder"),
            "sizes": [{"name": "small", "width": 16}, {"name": "large", "width": 32}],
            "tokens": [5120],
            "loss": "train",
            "target": {"size": {"width": 64}, "tokens": 20480},
        }
        path = tmp_path / "ladder.yaml"
        path.write_text(json.dumps(described | keys))
        return plan_ladder(*load_ladder(path))

    return plan


def trained(run: PlannedRun, steps: int | None = None) -> None:
    """Write a run folder with the files that these tests read."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump(run.config))
    last = run.steps if steps is None else steps
    row = {"step": last, "tokens": last, "flops": last, "loss": 3.0}
    (run.folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    event = {"event": "finished" if last == run.steps else "stopped", "step": last}
    (run.folder / "events.jsonl").write_text(json.dumps(event) + "\n")


def test_runs_of_another_ladder_are_neither_done_nor_fitted(
    planned: Callable[..., LadderPlan],
) -> None:
    before = planned()
    for run in before.runs:
        trained(run)
    assert {run["state"] for run in planned_facts(before)["runs"]} == {"done"}
    work.save_ladder(before)
    kept = {name: before.folder / name for name in (work.LADDER, work.FIT, work.PREDICTION)}
    for path in (kept[work.FIT], kept[work.PREDICTION]):
        path.write_text("as it was")
    texts = {name: path.read_text() for name, path in kept.items()}

    sizes = [{"name": "small", "width": 48}, {"name": "large", "width": 32}]
    now = planned(sizes=sizes)
    with pytest.raises(UserError) as caught:
        as_stored(now.rungs[0], now, ())
    said = str(caught.value)
    assert "small-d5120-s0 was trained with model.ffn_width=32, and the ladder now says 96" in said
    facts = planned_facts(now)
    assert [run["state"] for run in facts["runs"]] == ["changed", "done", "done"]
    assert facts["runs"][0]["spent_flops"] == facts["runs"][0]["step"] == 0
    assert facts["runs"][0]["final_loss"] is None
    assert said in facts["notes"]
    assert f"note: {said}" in status_text(facts)
    assert "2 of 3 runs done" in status_text(facts)
    for attempt in (
        lambda: work.fit(now),
        lambda: work.predict(now, again=True),
        lambda: work.run(now, None, None, lambda line: None),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        assert str(caught.value) == said
    assert {name: path.read_text() for name, path in kept.items()} == texts


def test_changed_target_is_not_measured(planned: Callable[..., LadderPlan]) -> None:
    before = planned()
    assert before.target is not None
    trained(before.target)
    size = {"name": "w64", "width": 64, "set": {"optimizer.lr": 0.5}}
    now = planned(target={"size": size, "tokens": 20480})
    assert now.target is not None
    assert now.target.folder == before.target.folder
    with pytest.raises(UserError, match="and the ladder now says"):
        work.predict(now, again=False)


OPTIONAL = ("fix", "bootstraps", "runs")


def kept_prediction(plan: LadderPlan, **changes: Any) -> None:
    assert plan.target is not None
    values: dict[str, Any] = {
        "law": plan.ladder.law,
        "target": {"run": plan.target.name, "N": plan.target.parameters, "D": plan.target.tokens},
        "predicted": 3.0,
        "low": 2.9,
        "high": 3.1,
        "level": 0.95,
        "rungs": 6,
        "loss": "training loss of the mixture, mean over the last 10% of the steps, nats per token",
        "time": 1.0,
        "target_state": "planned",
        "target_step": 0,
        "warnings": ("as it was",),
        "fix": dict(plan.ladder.fix),
        "bootstraps": plan.ladder.bootstraps,
        "runs": tuple(run.name for run in plan.rungs),
    }
    save_prediction(plan.folder / work.PREDICTION, Prediction(**values | changes))


def test_kept_prediction_says_what_the_ladder_says_otherwise(
    planned: Callable[..., LadderPlan],
) -> None:
    plan = planned()
    assert plan.target is not None
    trained(plan.rungs[0])
    trained(plan.target, steps=5)
    kept_prediction(plan)
    assert work.predict(plan, again=False).warnings == ("as it was",)
    source = plan.target.config.data.sources[0].name
    for keys, said in (
        ({"law": "kaplan"}, "is of law chinchilla, and the ladder now says kaplan"),
        ({"count": "total"}, "and the ladder now counts"),
        ({"loss": f"train/{source}"}, "is of another loss (training loss of the mixture"),
        ({"fix": {"E": 0}}, "was fitted with nothing fixed, and the ladder now fixes E=0"),
        ({"bootstraps": 70}, f"of {plan.ladder.bootstraps} bootstraps, and the ladder now says 70"),
        ({"tokens": [5120, 9216]}, "the ladder now has: not of large-d9216-s0, small-d9216-s0"),
        ({"sizes": [{"name": "small", "width": 16}]}, "the ladder now has: of large-d5120-s0"),
    ):
        found = work.predict(planned(**keys), again=False)
        assert len(found.warnings) == 2, found.warnings
        text = prediction_text(found)
        assert said in text
        assert "note: this prediction " in text
        assert "allometry ladder predict --again makes a new one" in text
        # It describes the current ladder, so the stored file omits it.
        assert work.predict(plan, again=False).warnings == ("as it was",)
    # Files from before these fields were stored are not checked.
    path = plan.folder / work.PREDICTION
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({key: kept[key] for key in kept if key not in OPTIONAL}))
    assert work.predict(planned(fix={"E": 0}), again=False).warnings == ("as it was",)


def test_kept_prediction_is_not_held_to_another_loss(planned: Callable[..., LadderPlan]) -> None:
    plan = planned()
    assert plan.target is not None
    for run in plan.runs:
        trained(run)
    kept_prediction(plan, loss="held-out loss of something", measured=3.05)
    found = work.predict(plan, again=False)
    assert found.measured == 3.05
    assert "is of another loss (held-out loss of something)" in found.warnings[-1]


def test_runs_that_branch_are_not_said_to_be_trained_from_scratch(
    planned: Callable[..., LadderPlan],
) -> None:
    schedule = {"kind": "wsd", "warmup_steps": 14, "decay_fraction": 0.3}
    named = [{"name": "wsd", "schedule": schedule}]
    plan = planned(tokens=[5120, 10240, 20480, 40960], schedules=named)
    branches = {run.name for run in plan.runs if run.parent is not None}
    alone = {run.name for run in plan.runs} - branches
    assert branches
    assert plan.notes == (
        "small-d10240-wsd-s0, large-d10240-wsd-s0 are trained from scratch: schedule wsd follows "
        "the length of the run, so that no step after the warm-up is shared with the next shorter "
        "one",
    )
    assert {"small-d10240-wsd-s0", "large-d10240-wsd-s0"} <= alone


def test_status_fits_88_columns_and_says_units(planned: Callable[..., LadderPlan]) -> None:
    plan = planned(tokens=[98304, 196608], sizes=[{"name": "w128", "width": 128}])
    trained(plan.rungs[0])
    trained(plan.rungs[1], steps=5)
    facts = planned_facts(plan)
    facts["runs"][1] |= {"parent": "w128-d98304-s0", "parent_step": 154, "state": "running"}
    facts["runs"][0]["final_loss"] = 5.5
    head, units, first, second, target, *_ = lines = status_text(facts).splitlines()
    assert head.split() == ["run", "N", "D", "steps", "FLOPs", "state", "loss", "branches"]
    assert units.split()[:3] == ["tokens", "added", "nats/token"]
    assert (first.split()[0], *first.split()[-2:]) == ("w128-d98304-s0", "done", "5.5000")
    assert f" 5/{plan.rungs[1].steps} " in second
    assert second.endswith("d98304 at 154")
    assert target.split()[-1] == "planned"
    assert max(map(len, lines)) <= 88, lines
    # A parent of another size is given by its full name.
    facts["runs"][1]["parent"] = "other-size-d98304-s0"
    assert "other-size-d98304-s0 at 154" in status_text(facts)
