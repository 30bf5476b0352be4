"""A run compares the planner's prediction with its steps, and the planner adapts to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.launch.cli import app
from allometry.laws.predictions import EVENT, calibrate_runs
from allometry.scaling.planner.calibrate import Calibration
from allometry.scaling.planner.store import load, published, save
from allometry.trainer.record.prediction import WARM_UP, StepPrediction
from allometry.trainer.train import train
from run_folders import events

Make = Callable[..., RunConfig]
ON = ("record.prediction.cluster=a100", "record.prediction.every_steps=4")
SHORT = ("training.total_steps=12", "record.display_every_steps=1000")


def run(config: RunConfig) -> Path:
    train(config, device=torch.device("cpu"))
    return Path(config.run.folder)


def said(folder: Path) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == EVENT]


def test_a_run_records_predicted_and_measured_steps(tiny: Make, tmp_path: Path) -> None:
    folder = run(tiny(*SHORT, *ON, "training.compute_dtype=fp32", folder=tmp_path / "run"))
    found = said(folder)
    assert [event["step"] for event in found] == [WARM_UP + 4, WARM_UP + 8]
    for event in found:
        assert event["measured_s"] > 0
        assert event["low_s"] < event["predicted_s"] < event["high_s"]
        assert (event["steps"], event["row"]["hardware"]) == (4, "a100")
    after = calibrate_runs([folder])
    (one,) = after.compared
    assert one.steps == 8
    assert one.measured_s == np.median([event["measured_s"] for event in found])
    # The adapted prediction is closer to the measurement.
    before, then = (abs(np.log(s / one.measured_s)) for s in (one.before_s, one.after_s))
    assert then < before
    assert one.interval[0] < one.before_s < one.interval[1]


def test_without_a_description_nothing_is_predicted(tiny: Make, tmp_path: Path) -> None:
    folder = run(tiny(*SHORT, folder=tmp_path / "run"))
    assert not said(folder)
    with pytest.raises(UserError, match="recorded no predicted steps; train with record"):
        calibrate_runs([folder])


def test_a_type_that_the_cluster_has_no_rate_of_is_refused(tiny: Make, tmp_path: Path) -> None:
    config = tiny(*SHORT, *ON, "training.compute_dtype=fp64", folder=tmp_path / "run")
    with pytest.raises(UserError, match="precision='fp64' is not known on a100"):
        run(config)


def test_the_first_steps_do_not_count() -> None:
    told: list[dict[str, Any]] = []
    callback = StepPrediction({}, 3, lambda kind, **facts: told.append({"kind": kind, **facts}))  # type: ignore[arg-type]
    for step, seconds in enumerate([9.0, 9.0, 9.0, 1.0, 5.0, 2.0, 1.0], start=1):
        callback.additions(SimpleNamespace(step=step, seconds=seconds))  # type: ignore[arg-type]
    assert told == [{"kind": EVENT, "step": 6, "steps": 3, "measured_s": 2.0}]


def test_a_belief_is_the_same_from_its_file(tmp_path: Path) -> None:
    belief = published()
    save(belief, tmp_path / "belief.json")
    again = load(tmp_path / "belief.json")
    np.testing.assert_allclose(again.mean, belief.mean, atol=1e-6)
    np.testing.assert_allclose(again.covariance, belief.covariance, atol=3e-6)
    assert (again.kinds, again.scatter) == (belief.kinds, belief.scatter)
    assert ("h100", "16 bit", "dense") in belief.kinds
    assert np.linalg.eigvalsh(belief.covariance).min() > 0
    for text, why in (("{}", "is no calibration"), ("nonsense", "cannot be read")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UserError, match=why):
            load(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "absent.json")
    save(Calibration.before(), tmp_path / "plain.json")
    text = (tmp_path / "plain.json").read_text().replace('"rows_half"', '"rows_third"')
    (tmp_path / "plain.json").write_text(text)
    with pytest.raises(UserError, match="another version of the cost model"):
        load(tmp_path / "plain.json")


def test_a_plan_learns_from_runs(tiny: Make, tmp_path: Path) -> None:
    folder = run(tiny(*SHORT, *ON, "training.compute_dtype=fp32", folder=tmp_path / "run"))
    kept = tmp_path / "constants.json"
    asked = ["plan", "preset:demo", "--cluster", "a100", "--gpus", "8", "--json", "--top", "1"]

    def planned(*more: str) -> dict[str, Any]:
        done = CliRunner().invoke(app, [*asked, *more])
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads(done.output)
        return found

    plain, kept_as = planned(), ("--constants", str(kept))
    learnt = planned("--calibrate", str(folder), *kept_as)
    (one,) = learnt["learnt"]
    assert one["folder"] == str(folder)
    assert abs(np.log(one["after_s"] / one["measured_s"])) < abs(
        np.log(one["before_s"] / one["measured_s"])
    )
    assert learnt["layouts"][0]["seconds"] != plain["layouts"][0]["seconds"]
    # Numbers in the file are rounded.
    again = planned(*kept_as)["layouts"][0]["seconds"]
    assert again == pytest.approx(learnt["layouts"][0]["seconds"], rel=1e-3)
    kept.write_text("{}")
    with pytest.raises(UserError, match="is no calibration of the planner"):
        CliRunner().invoke(app, [*asked, *kept_as], catch_exceptions=False)
