"""Intervals beyond the data include the law's own error, estimated from held-out folds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.distance import distance, far_axis
from allometry.laws.fit.engine import fit, predict
from allometry.laws.fit.extrapolation import FormError, form_error
from allometry.laws.fit.store import load_fit, save_fit
from allometry.laws.fit.validate import hold_out_largest, leave_one_group_out
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.observations import LearningRates, Observations
from allometry.laws.registry import form_named
from allometry.laws.tables import read_table
from law_data import law_data

FORM = Chinchilla()
TRUE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
NOISE = 3e-3


def rows(seed: int, bend: float = 0.0, size: int = 6) -> Observations:
    """Return runs whose losses exceed the law by ``bend`` times the squared log of compute."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, size), np.geomspace(1e8, 2e10, size))
    return bent(n.ravel(), d.ravel(), bend, np.random.default_rng(seed))


def bent(
    n: np.ndarray, d: np.ndarray, bend: float, draw: np.random.Generator | None
) -> Observations:
    law = predict(FORM, TRUE, Observations.of({"N": n, "D": d}))
    above = bend * np.maximum(np.log(n * d / 1e16), 0.0) ** 2
    noise = 0.0 if draw is None else NOISE * draw.standard_normal(len(n))
    return Observations.of({"N": n, "D": d, "loss": law * np.exp(above + noise)})


TARGETS = (np.array([1e9, 3e9, 1e10]), np.array([6e10, 2e11, 2e11]))


def test_a_law_that_is_wrong_is_widened_until_it_covers() -> None:
    """The runs bend away from the law: 20 simulations of three targets further out."""
    before = after = 0
    for seed in range(20):
        whole = bootstrap(fit(FORM, rows(seed, bend=5e-4)), 60)
        target = bent(*TARGETS, 5e-4, None)
        for kind, sampled in (("before", replace(whole, form_error=None)), ("after", whole)):
            low_n, high_n = sampled.predict_interval(target)
            hits = int(((low_n <= target["loss"]) & (target["loss"] <= high_n)).sum())
            before, after = (before + hits, after) if kind == "before" else (before, after + hits)
    assert before <= 0.1 * 60, before
    assert after >= 0.6 * 60, after


def test_a_law_that_is_right_is_covered_and_hardly_widened() -> None:
    """20 simulations at 95 %: fewer than 16 hits of a target have probability .3 %."""
    target, hits, ratios = bent(*TARGETS, 0.0, None), np.zeros(3), []
    for seed in range(20):
        whole = bootstrap(fit(FORM, rows(seed)), 60)
        low_n, high_n = whole.predict_interval(target)
        hits += (low_n <= target["loss"]) & (target["loss"] <= high_n)
        narrow = replace(whole, form_error=None).predict_interval(target)
        ratios.append((high_n - low_n) / (narrow[1] - narrow[0]))
    assert (hits >= 16).all(), hits
    assert np.median(ratios) < 2.0, np.median(ratios)


def test_one_or_two_folds_do_not_say_that_a_law_is_right() -> None:
    """Nine runs and six parameters leave two folds, too few to estimate an error of the form."""
    for seed in range(4):
        few = fit(form_named("kappa"), rows(seed, size=3))
        found = form_error(few)
        assert found is not None
        assert found.folds == 2
        assert found.scale > 1e-4
    enough = [form_error(fit(form_named("kappa"), rows(seed))) for seed in range(4)]
    assert all(one is not None and one.folds == 5 for one in enough)
    assert min(one.scale for one in enough if one) == 0.0


def test_nothing_changes_within_the_data() -> None:
    whole = bootstrap(fit(FORM, rows(0, bend=1e-3)), 40)
    inside = Observations.of({"N": [1e8, 1e9], "D": [1e9, 2e10]})
    outside = Observations.of({"N": [1e10], "D": [1e9]})
    plain = replace(whole, form_error=None)
    for noise in (False, True):
        wide, narrow = (one.spread(inside, noise=noise) for one in (whole, plain))
        assert np.array_equal(wide.low_n, narrow.low_n)
        assert np.array_equal(wide.high_n, narrow.high_n)
        assert (wide.form_n == 0.0).all()
        assert (wide.noise_n > 0.0).all() == noise
    spread, narrow = whole.spread(outside), plain.spread(outside)
    assert spread.form_n[0] > 0.0
    predicted = whole.fit.predict(outside)
    for end, near in ((spread.low_n, narrow.low_n), (spread.high_n, narrow.high_n)):
        expected = np.hypot(np.log(near / predicted), spread.form_n)
        np.testing.assert_allclose(np.abs(np.log(end / predicted)), expected)


def test_distance_sees_what_leaves_its_range_together() -> None:
    fitted = Observations.of({"N": [1e8, 1e9, 1e8], "D": [1e10, 1e9, 1e9]})
    asked = Observations.of({"N": [1e9, 1e8, 4e9, 1e7], "D": [1e10, 1e9, 1e9, 1e9]})
    expected = np.log([10.0, 1.0, 4.0, 10.0])
    np.testing.assert_allclose(distance(FORM, fitted, asked), expected, atol=1e-12)


def test_half_widths_grow_with_distance_and_level() -> None:
    error = FormError(0.01, 5)
    far_n = np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(error.half_width(far_n, 0.95), 0.0195996 * far_n, rtol=1e-4)
    np.testing.assert_allclose(error.half_width(far_n, 0.5), 0.0067449 * far_n, rtol=1e-4)


def test_the_scale_is_that_of_an_error_that_grows_so() -> None:
    """Two exponents that differ beyond a cut: the loss falls slower by 0.01 for a factor of e."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 8), np.geomspace(1e8, 1e10, 8))
    n, d = n.ravel(), d.ravel()
    law = predict(FORM, TRUE, Observations.of({"N": n, "D": d}))
    slower = 0.01 * np.maximum(np.log(n * d / np.quantile(n * d, 0.5)), 0.0)
    observations = Observations.of({"N": n, "D": d, "loss": law * np.exp(slower)})
    found = form_error(fit(FORM, observations))
    assert found is not None
    assert found.folds == 5
    assert 0.006 < found.scale < 0.013
    exact = form_error(fit(FORM, Observations.of({"N": n, "D": d, "loss": law})))
    assert exact is not None
    assert exact.scale < 1e-6


def test_the_error_of_the_form_is_kept_with_the_fit(tmp_path: Path) -> None:
    whole = bootstrap(fit(FORM, rows(0, bend=1e-3)), 20)
    save_fit(tmp_path / "f.json", whole.fit, whole)
    again = load_fit(tmp_path / "f.json").bootstrap
    assert again is not None
    target = bent(*TARGETS, 0.0, None)
    assert np.array_equal(again.predict_interval(target), whole.predict_interval(target))


def test_laws_without_a_far_end_have_none() -> None:
    shares = Observations.of({"a": [0.1, 0.4], "b": [0.9, 0.6]})
    assert far_axis(form_named("mixing_exponential:a,b"), shares) is None
    steps = Observations.of({"step": [1.0, 2.0]}, ["x", "x"])
    curve = replace(steps, curves={"x": LearningRates(np.array([1e-3, 1e-3]), 0)})
    assert far_axis(form_named("tissue"), curve) is None
    losses = Observations.of({"loss": [3.0, 2.0]})
    fall = far_axis(form_named("downstream_error"), losses)
    assert fall is not None
    assert fall[1] > fall[0]
    few = rows(0).take([0, 7, 14, 21, 28])  # as many rows as parameters
    assert form_error(fit(FORM, few)) is None


def test_held_out_rows_say_how_many_intervals_held() -> None:
    """95 % of 36 rows by simulation: fewer than 29 have probability .1 %; not all in every one."""
    covered = []
    for seed in range(3):
        sampled = bootstrap(fit(FORM, rows(seed)), 100)
        held = leave_one_group_out(FORM, sampled.fit.observations, sampled=sampled)
        assert held.covered is not None
        inside, number = held.covered
        assert 29 <= inside <= number == 36
        covered.append(inside)
        assert leave_one_group_out(FORM, sampled.fit.observations).covered is None
    largest = hold_out_largest(FORM, rows(0), "N", samples=40)
    assert largest.covered is not None
    assert largest.covered[1] == 6
    assert largest.covered[0] >= 4
    assert hold_out_largest(FORM, rows(0), "N").covered is None


def test_chinchillas_own_points_beyond_the_fitted_compute() -> None:
    """The law is fitted up to quantiles of compute; the rows above are inside their intervals."""
    points = read_table(
        law_data("chinchilla_epoch") / "svg_extracted_data.csv",
        ["N", "D", "loss"],
        mapping={"N": "Model Size", "D": "`Training FLOP`/(6*N)"},
        where=["loss < 3.44"],
    )
    compute = points["N"] * points["D"]
    shares = []
    for cut in (0.75, 0.9):
        kept = compute <= np.quantile(compute, cut)
        whole = bootstrap(fit(FORM, points.take(kept)), 100)
        held = points.take(~kept)
        for sampled in (replace(whole, form_error=None), whole):
            low_n, high_n = sampled.predict_interval(held, noise=True)
            shares.append(float(((low_n <= held["loss"]) & (held["loss"] <= high_n)).mean()))
    before, after = shares[::2], shares[1::2]
    assert max(before) < 0.8, before
    assert min(after) >= 0.85, after
