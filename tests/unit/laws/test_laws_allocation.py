"""Compute-optimal sizes: in closed form, by search, with intervals; and IsoFLOP parabolas."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.allocation import compute_optimal, searched_size
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import Fit, fit, predict
from allometry.laws.forms.dense import Chinchilla, Kappa
from allometry.laws.forms.kaplan import Kaplan, KaplanTrajectory
from allometry.laws.isoflop import budgets, isoflop_optima, size_exponent
from allometry.laws.observations import Observations

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
    """A power of a sum is least where the sum is."""
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
        for name in ("N", "D", "loss"):
            low, high = best.intervals[name]
            assert low < getattr(exact, name) < high
            assert low < getattr(best, name) < high
        assert len(best.warnings) == number
        assert best.tokens_per_parameter == best.D / best.N
    assert compute_optimal(found, 1e20).intervals is None


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


LOPSIDED = {"E": 1.8, "A": 30.0, "B": 1e6, "alpha": 0.2, "beta": 0.6}


def profiles(width: float, shift: float = 0.0, law: dict[str, float] = TRUE) -> Observations:
    """Noise-free IsoFLOP rows at three budgets, ``width`` of ln N to each side of the optimum."""
    columns: dict[str, list[float]] = {"N": [], "D": [], "loss": []}
    for flops in (1e19, 1e20, 1e21):
        best = searched_size(Chinchilla(), law, flops / 6, flops)
        for x in np.linspace(-width, width, 7) + shift:
            columns["N"].append(best * np.exp(x))
            columns["D"].append(flops / 6 / columns["N"][-1])
    rows = Observations.of({"N": columns["N"], "D": columns["D"]})
    return Observations.of({**rows.columns, "loss": predict(Chinchilla(), law, rows)})


def test_narrow_parabolas_find_the_optimum() -> None:
    for profile in isoflop_optima(profiles(0.1)):
        exact = searched_size(Chinchilla(), TRUE, profile.flops / 6, profile.flops)
        assert pytest.approx(exact, rel=1e-3) == profile.N
    slope = size_exponent(isoflop_optima(profiles(0.1)))
    assert slope is not None
    assert slope[0] == pytest.approx(0.37 / (0.35 + 0.37), abs=1e-3)


def test_wide_parabolas_are_biased_without_any_noise() -> None:
    """The documented caveat, where N and D have different exponents."""
    for profile in isoflop_optima(profiles(2.0, law=LOPSIDED)):
        exact = searched_size(Chinchilla(), LOPSIDED, profile.flops / 6, profile.flops)
        assert abs(profile.N / exact - 1.0) > 0.1
        assert profile.problem is None


def test_parabolas_describe_their_rows() -> None:
    rows = profiles(0.1)
    profile = isoflop_optima(rows)[1]
    assert profile.flops == pytest.approx(1e20)
    assert profile.rows.tolist() == list(range(7, 14))
    assert pytest.approx(1e20 / 6 / profile.N) == profile.D
    np.testing.assert_allclose(profile.losses(rows["N"][7:14]), rows["loss"][7:14], rtol=1e-5)
    assert profile.losses(np.array([profile.N]))[0] == pytest.approx(profile.loss)


def test_parabolas_without_an_inner_optimum_say_so() -> None:
    rising = isoflop_optima(profiles(0.5, 2.0))[0]
    assert rising.problem == "the least value lies outside of the sizes that were run"
    assert pytest.approx(profiles(0.5, 2.0)["N"][0]) == rising.N
    bent = Observations.of({"N": [1e8, 2e8, 4e8], "C": [1e19] * 3, "loss": [3.0, 3.1, 3.0]})
    assert isoflop_optima(bent)[0].problem == "the parabola has no least value"
    assert isoflop_optima(bent.take([0, 1])) == []
    assert size_exponent([rising]) is None


def test_budgets_are_rows_of_nearly_equal_flops() -> None:
    flops = np.array([1e20, 1.05e19, 1e19, 9.9e19, 1.2e19])
    assert [rows.tolist() for rows in budgets(flops)] == [[1, 2], [4], [0, 3]]
    assert [rows.tolist() for rows in budgets(flops, 0.3)] == [[1, 2, 4], [0, 3]]
