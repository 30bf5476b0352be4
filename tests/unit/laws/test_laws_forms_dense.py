"""Values, derivatives and refusals of the dense laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import predict
from allometry.laws.fit.problem import Problem
from allometry.laws.forms.base import Form
from allometry.laws.forms.dense import Chinchilla, Kappa
from allometry.laws.forms.farseer import (
    Farseer,
    stretched,
    stretched_slope,
)
from allometry.laws.forms.kaplan import Kaplan, KaplanTrajectory
from allometry.laws.observations import Observations
from allometry.laws.registry import all_forms
from farseer_paper import from_paper

ROWS = Observations.of(
    {
        "N": [1e7, 3e8, 7e10],
        "D": [2e9, 6e9, 1.4e12],
        "S_min": [1e3, 2e4, 1e6],
        "loss": [4.0, 3.0, 2.0],
    }
)
VALUES = {
    "chinchilla": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    "kappa": {"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.55, "kappa": 0.7},
    "farseer": {
        "endless": 0.6,
        "endless_slope": -0.1,
        "gamma": 0.2,
        "coefficient": 5.0,
        "coefficient_slope": -1.0,
        "beta": -0.1,
        "exponent": -1.1,
        "exponent_slope": -0.2,
        "alpha": 0.1,
    },
    "kaplan": {"N_c": 8e13, "D_c": 5e13, "alpha_N": 0.08, "alpha_D": 0.1},
    "kaplan_trajectory": {"N_c": 6e13, "S_c": 2e3, "alpha_N": 0.08, "alpha_S": 0.7},
}
PAPER = {
    "a1": -0.12, "alpha": 0.12, "b1": 0.4,
    "a2": 88.0, "beta": -0.1, "b2": -6.0,
    "a3": -0.02, "gamma": 0.17, "b3": -0.09,
}  # fmt: skip
FORMS = [Chinchilla(), Kappa(), Farseer(), Kaplan(), KaplanTrajectory()]


def by_hand(name: str, n: float, d: float, s: float) -> float:
    """Return the printed equations, one row at a time."""
    v = VALUES[name]
    if name == "chinchilla":
        return v["E"] + v["A"] / n ** v["alpha"] + v["B"] / d ** v["beta"]
    if name == "kappa":
        return v["E"] + (v["A"] / n ** v["a"] + v["B"] / d ** v["b"]) ** v["kappa"]
    if name == "kaplan":
        inside = (v["N_c"] / n) ** (v["alpha_N"] / v["alpha_D"]) + v["D_c"] / d
        return float(inside ** v["alpha_D"])
    if name == "kaplan_trajectory":
        return (v["N_c"] / n) ** v["alpha_N"] + (v["S_c"] / s) ** v["alpha_S"]
    p = Farseer().restated(v)
    exponent = -math.exp(p["a1"] * n ** p["alpha"] + p["b1"])
    coefficient = math.exp(p["a2"] * n ** p["beta"] + p["b2"])
    return math.exp(p["a3"] * n ** p["gamma"] + p["b3"]) + coefficient * d**exponent


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_predictions_are_the_equation(form: Form) -> None:
    expected = [
        by_hand(form.name, n, d, s)
        for n, d, s in zip(ROWS["N"], ROWS["D"], ROWS["S_min"], strict=True)
    ]
    np.testing.assert_allclose(predict(form, VALUES[form.name], ROWS), expected, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_is_registered_and_takes_many_sets_at_once(form: Form) -> None:
    assert type(all_forms()[form.name]) is type(form)
    moved = {k: v * (1.0 + 0.01 * i) for i, (k, v) in enumerate(VALUES[form.name].items())}
    both = {k: np.array([[VALUES[form.name][k]], [moved[k]]]) for k in moved}
    found = form.predict(both, form.prepare(ROWS))
    np.testing.assert_allclose(found[0], predict(form, VALUES[form.name], ROWS), rtol=1e-14)
    np.testing.assert_allclose(found[1], predict(form, moved, ROWS), rtol=1e-14)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_slopes_are_those_of_finite_differences(form: Form) -> None:
    problem = Problem(form, ROWS)
    x_P = problem.coordinates(VALUES[form.name])
    _, slopes = problem.slopes(x_P[None])
    step = 1e-5
    for index in range(len(x_P)):
        moved = np.tile(x_P, (2, 1))
        moved[0, index] += step
        moved[1, index] -= step
        up, down = problem.residuals(moved)
        np.testing.assert_allclose(slopes[0, index], (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", [Chinchilla(), Kappa(), Farseer()], ids=lambda form: form.name)
def test_own_derivatives_equal_complex_steps(form: Form) -> None:
    class Plain(type(form)):  # type: ignore[misc]
        def derivatives(self, values: object, prepared: object) -> None:
            return None

    x_SP = Problem(form, ROWS).coordinates(VALUES[form.name]) + np.array([[0.0], [0.01]])
    own, plain = Problem(form, ROWS).slopes(x_SP), Problem(Plain(), ROWS).slopes(x_SP)
    np.testing.assert_allclose(own[0], plain[0], rtol=0, atol=1e-14)
    np.testing.assert_allclose(own[1], plain[1], rtol=1e-12)


def test_kappa_of_one_is_chinchilla() -> None:
    v = VALUES["chinchilla"]
    same = {"E": v["E"], "A": v["A"], "B": v["B"], "a": v["alpha"], "b": v["beta"], "kappa": 1.0}
    np.testing.assert_allclose(predict(Kappa(), same, ROWS), predict(Chinchilla(), v, ROWS))


def test_published_chinchilla_at_its_own_model() -> None:
    """Hoffmann's coefficients at Chinchilla's 70B and 1.4T: 1.69 + .08348 + .16317 by hand."""
    row = Observations.of({"N": [70e9], "D": [1.4e12]})
    expected = 1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28
    found = predict(Chinchilla(), Chinchilla.published["hoffmann"], row)[0]
    assert found == pytest.approx(expected, rel=1e-14)
    assert found == pytest.approx(1.93665, abs=2e-5)


def test_farseer_translates_to_the_paper_and_back() -> None:
    back = Farseer().restated(from_paper(PAPER))
    assert back == pytest.approx(PAPER, rel=1e-12)


def test_stretched_is_smooth_where_its_power_is_zero() -> None:
    log_n = np.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(stretched(0.0, log_n), log_n)
    for power in (1e-7, 1e-5, 1e-3):
        exact = [math.expm1(power * x) / power for x in log_n]
        np.testing.assert_allclose(stretched(power, log_n), exact, rtol=1e-10)
    for power in (0.0, 1e-7, 1e-4, 4e-4, 1e-2, -0.3):
        exact = stretched(power + 1e-30j, log_n).imag / 1e-30
        found = stretched_slope(power, log_n, stretched(power, log_n))
        np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-13)


def test_least_steps_follow_from_the_batch() -> None:
    rows = {"N": [1e8, 1e8], "S": [1e4, 1e4], "B": [1e5, 1e6], "B_crit": [1e6, 1e6]}
    form, values = KaplanTrajectory(), VALUES["kaplan_trajectory"]
    least = Observations.of({"N": [1e8, 1e8], "S_min": [1e4 / 11, 1e4 / 2]})
    found = predict(form, values, Observations.of(rows))
    np.testing.assert_allclose(found, predict(form, values, least), rtol=1e-14)
    with pytest.raises(UserError, match="no B_crit; map"):
        predict(form, values, Observations.of({k: v for k, v in rows.items() if k != "B_crit"}))


def test_rows_that_are_no_sizes_are_refused() -> None:
    with pytest.raises(UserError, match=r"N of row 2 is 0.0"):
        predict(Chinchilla(), VALUES["chinchilla"], Observations.of({"N": [1, 0], "D": [1, 1]}))
    with pytest.raises(UserError, match="no column 'D'"):
        predict(Chinchilla(), VALUES["chinchilla"], Observations.of({"N": [1.0]}))
