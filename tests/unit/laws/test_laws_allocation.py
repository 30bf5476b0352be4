"""Compute-optimal sizes: in closed form, by search, with intervals and exponents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.allocation import best_share, compute_optimal, searched_size
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import Fit, fit, predict
from allometry.laws.forms.dense import Chinchilla, Kappa
from allometry.laws.forms.farseer import Farseer
from allometry.laws.forms.kaplan import Kaplan, KaplanTrajectory
from allometry.laws.observations import Observations
from farseer_paper import from_paper

TRUE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}


@pytest.fixture(scope="module")
def found() -> Fit:
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e9, 1e12, 6))
    rows = Observations.of({"N": n.ravel(), "D": d.ravel()})
    noise = np.random.default_rng(0).normal(0.0, 1e-3, 36)
    loss = predict(Chinchilla(), TRUE, rows) * np.exp(noise)
    return fit(Chinchilla(), Observations.of({**rows.columns, "loss": loss}))


@pytest.mark.parametrize("flops", [1e16, 1e19, 1e22, 1e26])
@pytest.mark.parametrize("each", [6.0, 8.0])
def test_search_and_closed_form_agree(found: Fit, flops: float, each: float) -> None:
    best = compute_optimal(found, flops, each)
    searched = searched_size(found.form, found.values, flops / each, flops)
    assert searched == pytest.approx(best.N, rel=1e-9)
    assert best.N * best.D * each == pytest.approx(flops, rel=1e-12)
    assert best.loss == found.predict(Observations.of({"N": [best.N], "D": [best.D]}))[0]


def test_no_other_share_is_better(found: Fit) -> None:
    best = compute_optimal(found, 1e20)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        row = Observations.of({"N": [best.N * factor], "D": [best.D / factor]})
        assert found.predict(row)[0] > best.loss


def test_kaplan_in_closed_form() -> None:
    """At the optimum of equation 1.5, α_N/α_D·(N_c/N)^(α_N/α_D) = D_c/D."""
    values = {"N_c": 8e13, "D_c": 5e13, "alpha_N": 0.08, "alpha_D": 0.1}
    size = searched_size(Kaplan(), values, 1e20 / 6, 1e20)
    assert 0.8 * (8e13 / size) ** 0.8 == pytest.approx(5e13 / (1e20 / 6 / size), rel=1e-8)


def test_kappa_keeps_the_shares_of_its_inner_sum(found: Fit) -> None:
    """A power of a sum is minimal where the sum is."""
    values = {"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.55, "kappa": 0.7}
    inner = {"E": 0.0, "A": 2e3, "B": 3e4, "alpha": 0.5, "beta": 0.55}
    size = searched_size(Kappa(), values, 1e20, 6e20)
    assert size == pytest.approx(searched_size(Chinchilla(), inner, 1e20, 6e20), rel=1e-8)


def test_intervals_hold_the_truth_and_extrapolation_is_said(found: Fit) -> None:
    truth = Fit(found.form, TRUE, 0.0, found.certificate, found.observations, found.options)
    for flops, number in ((1e20, 0), (1e26, 2)):
        best = compute_optimal(found, flops, bootstrap=bootstrap(found, 100))
        exact = compute_optimal(truth, flops)
        assert best.intervals is not None
        for name in ("N", "D", "loss", "exponent"):
            low, high = best.intervals[name]
            assert low < getattr(exact, name) < high
            assert low < getattr(best, name) < high
        assert len(best.warnings) == number
        assert best.tokens_per_parameter == best.D / best.N
    assert compute_optimal(found, 1e20).intervals is None


def test_exponents_are_those_of_closed_forms(found: Fit) -> None:
    """β/(α+β) of Chinchilla's law (arXiv 2203.15556, equation 4), and the same for kappa's inner
    sum; Farseer has no fixed exponent, but a slope between budgets."""
    alpha, beta = (found.values[name] for name in ("alpha", "beta"))
    for flops in (1e18, 1e24):
        best = compute_optimal(found, flops)
        assert best.exponent == pytest.approx(beta / (alpha + beta), abs=1e-9)
    values = {"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.55, "kappa": 0.7}
    assert best_share(Kappa(), values, 1e21).exponent == pytest.approx(0.55 / 1.05, abs=1e-6)
    paper = {"a1": -0.124, "alpha": 0.123, "b1": 0.424, "a2": 88.01, "beta": -0.1, "b2": -6.287}
    values = from_paper({**paper, "a3": -0.021, "gamma": 0.169, "b3": -0.091})
    powers = [best_share(Farseer(), values, flops) for flops in (1e20, 5e20, 2e21)]
    assert 1 < powers[0].tokens_per_parameter < 1000  # not the second descent at N = 1e17
    slope = np.log(powers[2].N / powers[0].N) / np.log(20)
    assert min(p.exponent for p in powers) < slope < max(p.exponent for p in powers)


def test_samples_without_an_optimum_are_left_out_aloud(found: Fit) -> None:
    drawn = bootstrap(found, 20)
    values_BP = drawn.values_BP.copy()
    values_BP[3, drawn.names.index("beta")] = 0.0
    some = replace(drawn, values_BP=values_BP)
    best = compute_optimal(found, 1e20, bootstrap=some)
    assert best.warnings[-1].startswith("1 of 20 bootstrap samples have no optimum at 1e+20 FLOPs")
    assert best.intervals is not None
    assert best.intervals["exponent"][0] > 0.1
    values_BP[:11, drawn.names.index("beta")] = 0.0
    with pytest.raises(UserError, match="in 11 of 20 bootstrap samples the law has no compute-opt"):
        compute_optimal(found, 1e20, bootstrap=replace(drawn, values_BP=values_BP))


def test_laws_without_a_best_share_say_so(found: Fit) -> None:
    def given(values: dict[str, float], form: object = None) -> Fit:
        return Fit(
            form or found.form,  # type: ignore[arg-type]
            values,
            0.0,
            found.certificate,
            found.observations,
            found.options,
        )

    with pytest.raises(UserError, match="does not fall with both"):
        compute_optimal(given({**TRUE, "beta": 0.0}), 1e20)
    flat = given({"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.0, "kappa": 0.7}, Kappa())
    with pytest.raises(UserError, match=r"no compute-optimal size at 1e\+20"):
        compute_optimal(flat, 1e20)
    other = given({"N_c": 6e13, "S_c": 2e3, "alpha_N": 0.08, "alpha_S": 0.7}, KaplanTrajectory())
    with pytest.raises(UserError, match="predicts from N, S_min, not from N and D"):
        compute_optimal(other, 1e20)
    with pytest.raises(UserError, match="flops=0"):
        compute_optimal(found, 0.0)
    with pytest.raises(UserError, match="too few to share"):
        searched_size(Chinchilla(), TRUE, 10.0, 60.0)
