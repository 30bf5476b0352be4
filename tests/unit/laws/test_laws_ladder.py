"""Predictions of a ladder's target: their interval, file and messages."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import fit
from allometry.laws.ladder import (
    Prediction,
    load_prediction,
    predict_target,
    save_prediction,
    unidentified,
)
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

TARGET: dict[str, Any] = {"run": "target-w128", "folder": "runs/target", "N": 4e6, "D": 8e7}


def law(n: Any, d: Any) -> Any:
    return 1.8 + 400.0 / n**0.35 + 1500.0 / d**0.36


def rungs(noise: float, seed: int = 0, sizes: int = 5, span: float = 64.0) -> Observations:
    n, d = np.meshgrid(np.geomspace(1e5, 2e6, sizes), np.geomspace(5e5, 5e5 * span, 5))
    n, d = n.ravel(), d.ravel()
    draw = np.random.default_rng(seed)
    loss = law(n, d) * np.exp(noise * draw.standard_normal(len(n)))
    return Observations.of({"N": n, "D": d, "loss": loss})


def prediction(observations: Observations, **options: Any) -> Prediction:
    found = fit(form_named("chinchilla"), observations)
    given = {"state": "planned", "step": 0} | options
    return predict_target(found, bootstrap(found, 100), TARGET, **given)


def test_interval_holds_the_target_and_grows_with_the_scatter() -> None:
    true = law(TARGET["N"], TARGET["D"])
    calm, wild = prediction(rungs(1e-4)), prediction(rungs(1e-2))
    assert abs(calm.predicted / true - 1) < 2e-3
    assert calm.low is not None
    assert calm.high is not None
    assert wild.low is not None
    assert wild.high is not None
    assert calm.low < true < calm.high
    assert wild.low < true < wild.high
    assert wild.high - wild.low > 10 * (calm.high - calm.low)
    assert any("4e+06" in warning or "N" in warning for warning in calm.warnings), "out of range"


@pytest.mark.slow
def test_interval_covers_one_more_run_as_often_as_it_says() -> None:
    """95 % of intervals of 40 simulated ladders; by chance no fewer than 33 (p < 0.002)."""
    true, covered = law(TARGET["N"], TARGET["D"]), 0
    for seed in range(40):
        found = prediction(rungs(3e-3, seed))
        run = true * np.exp(3e-3 * np.random.default_rng(1000 + seed).standard_normal())
        covered += bool(replace(found, measured=float(run)).covered)
    assert covered >= 33


def test_open_parameters_are_said_not_refused_and_have_no_interval(tmp_path: Path) -> None:
    narrow = fit(form_named("chinchilla"), rungs(2e-2, span=2.0))
    text = unidentified(narrow)
    assert text is not None
    assert "hardly identify" in text
    known = prediction(rungs(2e-2, span=2.0))
    assert text in known.warnings
    assert known.low is not None  # from folds
    one_horizon = rungs(1e-3).take(rungs(1e-3)["D"] < 6e5)
    found = prediction(one_horizon)
    assert any("cannot identify" in warning for warning in found.warnings)
    assert "no interval is given, as the rungs do not identify the law" in found.warnings
    assert (found.low, found.high) == (None, None)
    assert replace(found, measured=3.0).covered is None
    path = tmp_path / "prediction.json"
    save_prediction(path, found)
    assert load_prediction(path) == found
    assert unidentified(fit(form_named("chinchilla"), rungs(1e-5))) is None


def test_law_that_reads_what_is_not_known_before(tmp_path: Path) -> None:
    found = fit(form_named("chinchilla"), rungs(1e-3))
    target = {key: value for key, value in TARGET.items() if key != "D"}
    with pytest.raises(UserError, match="no column 'D'"):
        predict_target(found, bootstrap(found, 20), target, state="planned", step=0)


def test_what_went_to_zero_is_held_by_a_key_of_the_ladder() -> None:
    n, d = np.meshgrid([13_440.0, 30_096.0, 53_472.0], [32_768.0, 65_536.0, 98_304.0])
    loss = [6.425, 6.276, 6.341, 5.9972, 5.8389, 5.8475, 5.723, 5.5611, 5.5539]
    small = Observations.of({"N": n.ravel(), "D": d.ravel(), "loss": loss})
    text = unidentified(fit(form_named("chinchilla"), small))
    assert text is not None
    assert text.endswith(" (fix: {E: 0} in the ladder)")
    assert "--" not in text, "a ladder has no options of a law"


def test_file_of_a_prediction(tmp_path: Path) -> None:
    path = tmp_path / "ladder" / "prediction.json"
    assert load_prediction(path) is None
    before = prediction(rungs(1e-3))
    save_prediction(path, before)
    assert load_prediction(path) == before
    plain = json.loads(path.read_text())
    assert plain["measured"] is None
    assert plain["covered"] is None
    assert plain["target_state"] == "planned"
    assert abs(plain["time"] - time.time()) < 60
    after = replace(before, measured=before.predicted / 1.01)
    save_prediction(path, after)
    assert json.loads(path.read_text())["error"] == pytest.approx(0.01)
    assert load_prediction(path) == after
    assert before.high is not None
    assert replace(before, measured=before.high * 1.01).covered is False


@pytest.mark.parametrize("text", ["", "[]", '{"law": "x"}', "{"])
def test_file_of_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prediction.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a prediction"):
        load_prediction(path)
