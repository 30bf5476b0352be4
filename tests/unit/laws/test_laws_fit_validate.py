"""Held-out errors come from fits without the rows; forms are ranked by them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.compare import compare
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.fit.store import load_fit, save_fit
from allometry.laws.fit.validate import hold_out_largest, leave_one_group_out
from allometry.laws.forms.base import Form
from allometry.laws.forms.dense import Chinchilla, Kappa
from allometry.laws.forms.kaplan import Kaplan
from allometry.laws.observations import LearningRates, Observations
from allometry.laws.registry import form_named

KAPPA = {"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.55, "kappa": 0.7}
CHINCHILLA = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}


def runs(form: Form, values: dict[str, float], noise: float = 1e-3) -> Observations:
    """Return 36 runs in 6 groups of one size each."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6), indexing="ij")
    rows = Observations.of({"N": n.ravel(), "D": d.ravel()})
    loss = predict(form, values, rows) * np.exp(np.random.default_rng(0).normal(0.0, noise, 36))
    return Observations.of({**rows.columns, "loss": loss}, [f"{size:.0e}" for size in n.ravel()])


def test_leaving_out_a_group_is_a_fit_without_it() -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    held = leave_one_group_out(Chinchilla(), rows)
    groups = np.array(rows.groups)
    for group in np.unique(groups):
        fitted = fit(Chinchilla(), rows.take(groups != group))
        expected = fitted.predict(rows.take(groups == group))
        np.testing.assert_allclose(held.predicted[groups == group], expected, rtol=1e-6)
    assert np.array_equal(held.measured, rows["loss"])
    assert held.mean == pytest.approx(np.abs(held.predicted / rows["loss"] - 1).mean())
    assert held.max == pytest.approx(np.abs(held.predicted / rows["loss"] - 1).max())
    in_sample = np.abs(fit(Chinchilla(), rows).predict(rows) / rows["loss"] - 1).mean()
    assert held.mean > in_sample


def test_the_largest_are_held_out_by_any_column() -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    held = hold_out_largest(Chinchilla(), rows, "N")
    assert set(held.groups) == {"1e+10"}
    assert len(held.measured) == 6
    fitted = fit(Chinchilla(), rows.take(rows["N"] < 9e9))
    np.testing.assert_allclose(held.predicted, fitted.predict(rows.take(rows["N"] > 9e9)))
    two = hold_out_largest(Chinchilla(), rows, "D", number=2)
    assert len(two.measured) == 12
    assert held.max < 0.02


def test_what_cannot_be_held_out_is_refused() -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    with pytest.raises(UserError, match=r"hold out the 6 largest of N: .* 6 values"):
        hold_out_largest(Chinchilla(), rows, "N", number=6)
    with pytest.raises(UserError, match="no column 'width'"):
        hold_out_largest(Chinchilla(), rows, "width")
    few = rows.take([0, 7, 14, 21, 28])  # five groups of one row: four remain
    with pytest.raises(UserError, match="only 4 rows"):
        leave_one_group_out(Chinchilla(), few)
    alone = Observations(rows.columns, ("only",) * 36)
    with pytest.raises(UserError, match="belong to group 'only'"):
        leave_one_group_out(Chinchilla(), alone)


@pytest.mark.parametrize("by", ["group", "N"])
def test_the_form_that_made_the_data_wins(by: str) -> None:
    forms = [Kaplan(), Chinchilla(), Kappa()]
    assert compare(forms, runs(Kappa(), KAPPA), by=by)[0].form.name == "kappa"
    found = compare(forms, runs(Chinchilla(), CHINCHILLA), by=by)
    errors = {comparison.form.name: comparison.error for comparison in found}
    assert errors["chinchilla"] < errors["kaplan"]
    assert [c.error for c in found] == sorted(errors.values())
    assert all(c.in_sample <= c.error for c in found)


def test_a_form_that_refuses_stays_in_the_list_and_says_why() -> None:
    rows = runs(Chinchilla(), CHINCHILLA).take(range(0, 36, 7))  # six runs
    found = compare([Kappa(), Kaplan()], rows.take([0, 1, 2, 3, 4]), by="N")
    assert [comparison.form.name for comparison in found] == ["kaplan", "kappa"]
    assert found[0].problem is None
    assert "6 parameters" in str(found[1].problem)
    assert found[1].error == np.inf


def test_a_group_without_which_nothing_can_be_fitted_is_left_out_with_a_note() -> None:
    """Six rows in two groups: five rows remain without the small one, one without the large one."""
    n, d = np.array([1e7, 1e8, 1e9, 1e7, 1e8, 1e9, 3e8]), np.geomspace(1e9, 1e11, 7)
    rows = Observations.of({"N": n, "D": d})
    loss = predict(Chinchilla(), CHINCHILLA, rows)
    rows = Observations.of({**rows.columns, "loss": loss}, ["one", *["many"] * 6])
    held = leave_one_group_out(Chinchilla(), rows)
    assert held.groups == ("one",)
    (note,) = held.notes
    assert note.startswith("group 'many' is not held out: chinchilla has 5 parameters to fit and")
    compared = compare([Chinchilla(), Kaplan()], rows, FitOptions(starts=32))
    assert all(one.problem is None for one in compared)


def test_the_other_objective_is_held_out_too() -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    loss = rows["loss"].copy()
    loss[[3, 20]] *= 1.2  # outliers, to which Huber's loss is robust
    rows = Observations({**rows.columns, "loss": loss}, rows.groups)
    (one,) = compare([Chinchilla()], rows, FitOptions(starts=64), by="N")
    assert one.held_out is not None
    assert one.other is not None
    square = hold_out_largest(Chinchilla(), rows, "N", FitOptions(starts=64, loss="square"))
    np.testing.assert_array_equal(one.other.predicted, square.predicted)
    assert one.error < one.other.mean


def test_a_fragile_law_is_marked_and_stands_after_the_others() -> None:
    """Without the largest of three sizes, two remain, which do not identify E, A and alpha."""
    rows = runs(Chinchilla(), CHINCHILLA)
    three = rows.take(np.isin(rows.groups, ["1e+07", "2e+08", "1e+10"]))
    assert len(three) == 18
    found = compare([Chinchilla(), Kaplan()], three, FitOptions(starts=64), by="N")
    assert [one.form.name for one in found] == ["kaplan", "chinchilla"]
    assert found[0].fragile == ()
    (why,) = found[1].fragile
    assert why.startswith("without the held-out rows the data cannot identify")


def test_a_law_whose_held_out_fit_goes_to_a_bound_is_fragile() -> None:
    """Without the largest runs, whose losses are high, E is 0."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 5))
    n, d = n.ravel(), d.ravel()
    loss = 30 / n**0.2 + 60 / d**0.2 - 0.1
    loss[n > 9e8] += 0.3
    rows = Observations.of({"N": n, "D": d, "loss": loss})
    options = FitOptions(starts=64, loss="square")
    found = compare([form_named("over_training"), Kaplan()], rows, options, by="N")
    assert [one.form.name for one in found] == ["kaplan", "over_training"]
    assert found[1].fragile == ("without the held-out rows E goes to a bound",)
    assert found[0].fragile == ()


def test_a_stored_fit_is_the_same_fit(tmp_path: Path) -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    curves = {rows.groups[0]: LearningRates(np.array([1e-3, 3e-4]), 1)}
    rows = Observations(rows.columns, rows.groups, curves, {"N": "all parameters"})
    found = fit(Chinchilla(), rows, FitOptions(starts=16))
    samples = bootstrap(found, 10)
    path = tmp_path / "fits" / "a.json"
    save_fit(path, found, samples, {"note": "x"})
    assert json.loads(path.read_text())["kind"] == "allometry.fit"
    again = load_fit(path)
    assert np.array_equal(again.fit.predict(rows), found.predict(rows))
    assert again.bootstrap is not None
    assert np.array_equal(again.bootstrap.values_BP, samples.values_BP)
    assert again.bootstrap.interval("alpha") == samples.interval("alpha")
    assert again.extra == {"note": "x"}
    kept = again.fit.observations
    assert kept.groups == rows.groups
    assert kept.conventions == {"N": "all parameters"}
    assert np.array_equal(kept.curves[rows.groups[0]].rates, [1e-3, 3e-4])
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    save_fit(path, found)
    assert load_fit(path).bootstrap is None


def test_numbers_that_are_not_finite_survive(tmp_path: Path) -> None:
    rows = runs(Chinchilla(), CHINCHILLA)
    columns = {**rows.columns, "other": np.array([np.nan, np.inf, -np.inf] * 12)}
    found = fit(Chinchilla(), Observations(columns, rows.groups), FitOptions(starts=16))
    save_fit(tmp_path / "a.json", found)
    again = load_fit(tmp_path / "a.json").fit.observations["other"]
    assert np.array_equal(again, columns["other"], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "not JSON"),
        ("[]", "holds no fit"),
        ('{"kind": "allometry.fit", "version": 2}', "of version 2"),
        ('{"kind": "allometry.fit", "version": 1}', "damaged"),
        ('{"kind": "allometry.fit", "version": 1, "form": null}', "damaged"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_no_fit_is_refused(tmp_path: Path, text: str | None, word: str) -> None:
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=word):
        load_fit(path)
