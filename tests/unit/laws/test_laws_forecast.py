"""Forecasts of curves that follow a known law: errors, intervals, unknowable cases."""

from __future__ import annotations

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.areas import areas_of
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.forecast import BINS, PUBLISHED, Curve, average, borrowed, forecast
from allometry.laws.forms.tissue import Tissue
from allometry.laws.observations import LearningRates, Observations

PEAK, WARMUP, STEPS, MEMORY = 2e-3, 50, 2000, 200.0
LAW = {"L0": 2.4, "A": 0.9, "C": 0.35, "alpha": 0.45}  # a full decay gains about 5 %


def rates(kind: str, steps: int = STEPS) -> LearningRates:
    s = np.arange(1, steps + 1)
    x = np.clip((s - WARMUP) / (steps - WARMUP), 0.0, 1.0)
    late = np.clip((s / steps - 0.8) / 0.2, 0.0, 1.0)
    found = (
        PEAK
        * {
            "constant": np.ones(steps),
            "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * x)),
            "wsd": 1 - np.sqrt(late),
        }[kind]
    )
    found[:WARMUP] = PEAK * s[:WARMUP] / WARMUP
    return LearningRates(found, WARMUP)


def truth(curve: LearningRates, gain: float = 1.0) -> np.ndarray:
    s1, s2 = areas_of(curve.rates, curve.warmup_steps, 1.0 - 1.0 / MEMORY)
    return LAW["L0"] + LAW["A"] * s1 ** -LAW["alpha"] - gain * LAW["C"] * s2


def run(
    kind: str,
    share: float = 1.0,
    noise: float = 0.0,
    seed: int = 0,
    skip: int = 1,
    gain: float = 1.0,
) -> Curve:
    whole = rates(kind)
    steps = np.arange(1, int(share * STEPS) + 1)[skip - 1 :: skip]
    drawn = np.random.default_rng(seed).standard_normal(len(steps))
    losses = truth(whole, gain)[steps - 1] * (1.0 + noise * drawn)
    return Curve(kind, steps, losses, whole)


def test_the_law_itself_is_found_from_a_whole_curve() -> None:
    found = forecast([run("cosine")], rates("cosine"))
    assert found.loss == pytest.approx(truth(rates("cosine"))[-1], rel=5e-4)
    assert found.quality.unmeasured == ()
    other = forecast([run("cosine"), run("constant")], rates("wsd"))
    assert other.loss == pytest.approx(truth(rates("wsd"))[-1], rel=2e-3)
    assert other.step == other.total_steps == STEPS


def test_the_posterior_agrees_with_the_engines_fit() -> None:
    curves = [run("constant", noise=2e-3), run("cosine", noise=2e-3, seed=1)]
    found = forecast(curves, rates("wsd"))
    observations = Observations(
        {
            "step": np.concatenate([c.steps_n[200:] for c in curves]).astype(float),
            "loss": np.concatenate([c.losses_n[200:] for c in curves]),
        },
        tuple(c.name for c in curves for _ in c.steps_n[200:]),
        {c.name: c.rates for c in curves},
    )
    law = fit(Tissue(), observations, FitOptions(loss="square", starts=4))
    last = Observations({"step": np.array([float(STEPS)])}, ("wsd",), {"wsd": rates("wsd")})
    assert found.loss == pytest.approx(law.predict(last)[0], rel=2e-3)


@pytest.mark.parametrize(
    ("kind", "share", "noise"),
    [("constant", 0.5, 0.02), ("cosine", 0.6, 0.02), ("cosine", 0.8, 0.01), ("wsd", 0.9, 0.01)],
)
def test_intervals_cover_at_their_rate(kind: str, share: float, noise: float) -> None:
    exact = truth(rates(kind))[-1]
    found = [forecast([run(kind, share, noise, seed)], rates(kind)) for seed in range(40)]
    covered = np.mean([f.low <= exact <= f.high for f in found])
    assert covered >= 0.9  # 95 %, with the error of 40 draws
    width = np.mean([f.high - f.low for f in found])
    spread = np.std([f.loss for f in found])
    assert spread < width < 0.1 * exact
    half = [forecast([run(kind, share, noise, seed)], rates(kind), level=0.5) for seed in range(4)]
    assert np.mean([f.high - f.low for f in half]) < 0.5 * width


def test_no_decay_seen_leaves_its_gain_to_the_prior() -> None:
    blind = forecast([run("constant", noise=0.005)], rates("wsd", 2 * STEPS))
    assert "gain" in blind.quality.unmeasured
    assert "memory" in blind.quality.unmeasured
    assert any("rests on the prior" in warning for warning in blind.warnings)
    assert blind.quality.gain.mean == pytest.approx(PUBLISHED.gain.mean, abs=1e-6)
    assert blind.quality.gain.sd == pytest.approx(PUBLISHED.gain.sd, abs=1e-6)
    none = forecast([run("constant", noise=0.005)], rates("constant", 2 * STEPS))
    assert not any("prior" in warning for warning in none.warnings)
    assert (none.high - none.low) < 0.4 * (blind.high - blind.low)
    # Includes both no gain and twice the prior's gain.
    assert blind.low < none.loss * 0.93
    assert blind.high > none.loss * 0.995


def test_another_run_lends_what_this_one_has_not_measured() -> None:
    target = rates("wsd", 2 * STEPS)
    curve = run("constant", noise=0.005)
    prior = borrowed([run("cosine", noise=0.005, seed=3, gain=1.8)], target, "runs/other")
    lent = forecast([curve], target, prior=prior)
    alone = forecast([curve], target)
    exact = truth(target, gain=1.8)[-1]
    assert lent.low < exact < lent.high
    assert abs(lent.loss - exact) < abs(alone.loss - exact)
    assert (lent.high - lent.low) < 0.6 * (alone.high - alone.low)
    assert lent.prior == "runs/other"
    assert any("runs/other" in warning for warning in lent.warnings)
    with pytest.raises(UserError, match="has measured no gain"):
        borrowed([run("constant")], target, "runs/constant")


def test_outliers_move_a_forecast_little() -> None:
    clean = run("cosine", 0.7, 0.01)
    spoiled = clean.losses_n.copy()
    spoiled[[300, 301, 700, 1100]] = 30.0
    found = forecast([Curve("spikes", clean.steps_n, spoiled, clean.rates)], clean.rates)
    assert found.loss == pytest.approx(forecast([clean], clean.rates).loss, rel=5e-3)
    harmed = clean.losses_n.copy()
    harmed[700:] *= 1.05  # not an outlier: a failed run must be detected
    worse = forecast([Curve("harmed", clean.steps_n, harmed, clean.rates)], clean.rates)
    assert worse.loss > 1.01 * found.loss


def test_residuals_that_go_together_widen_the_interval() -> None:
    curve = run("constant", 0.5, 0.003)
    drawn = np.random.default_rng(1).standard_normal(len(curve.steps_n))
    slow = np.convolve(drawn, np.ones(80) / np.sqrt(80), mode="same")
    wandering = Curve("slow", curve.steps_n, curve.losses_n * (1 + 0.005 * slow), curve.rates)
    one, other = (forecast([c], rates("constant")) for c in (curve, wandering))
    assert other.quality.persistence > 0.5 > one.quality.persistence
    assert other.quality.effective_rows < 0.4 * one.quality.effective_rows
    assert (other.high - other.low) > 1.5 * (one.high - one.low)


def test_rows_are_averaged_evenly_and_the_beginning_is_left_out() -> None:
    curve = run("constant")
    rows = average([curve, run("cosine", skip=10)])
    assert rows.starts == (0, BINS)
    assert len(rows.loss_n) == BINS + 150
    first = rates("constant").rates[: int(0.25 * STEPS)].sum()
    assert rows.s1_n[0] > first
    np.testing.assert_allclose(rows.loss_n[0], curve.losses_n[500:507].mean(), rtol=1e-12)
    np.testing.assert_allclose(rows.loss_n[BINS - 1], curve.losses_n[-8:].mean(), rtol=1e-12)


def test_of_few_rows_only_the_first_tenth_is_left_out() -> None:
    few = run("constant", skip=80)  # 25 rows, 19 of them after the first quarter
    rows = average([few])
    assert len(rows.loss_n) == 23
    assert rows.loss_n[0] == few.losses_n[2]  # the row of step 240


def test_warnings_say_what_is_extrapolated() -> None:
    curve = run("constant", 0.2)
    assert any("times as long" in w for w in forecast([curve], rates("constant")).warnings)
    other = forecast([run("constant", 0.9)], rates("cosine"))
    assert any("does not continue" in warning for warning in other.warnings)
    assert not forecast([run("constant", 0.9, 0.005)], rates("constant")).warnings


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(UserError, match="a forecast needs 20"):
        forecast([run("constant", 0.03)], rates("constant"))
    short = LearningRates(rates("constant").rates[:40], WARMUP)
    with pytest.raises(UserError, match="within its warm-up"):
        forecast([run("constant")], short)


def test_a_forecast_is_the_same_twice() -> None:
    curves = [run("cosine", 0.6, 0.02)]
    assert forecast(curves, rates("cosine")) == forecast(curves, rates("cosine"))
