"""The regret of a transferred rate, for losses with a known regret."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from allometry.laws.optimum import Sweep, drift
from allometry.laws.regret import (
    Regret,
    against,
    jackknife,
    loss_at,
    regret,
    regrets,
    verdict,
)

GRID = tuple(np.arange(-8.0, -1.9, 0.5).tolist())
DEPTH = 0.08
"""Loss increase in nats at a rate one octave from the best one."""


def bowl(
    vertices: list[float],
    *,
    depth: float = DEPTH,
    floors: list[float] | None = None,
    rates: tuple[float, ...] = GRID,
) -> Sweep:
    """Return floor + depth (rate - vertex)², a column per seed."""
    x, v = np.array(rates)[:, None], np.array(vertices)[None, :]
    return Sweep(rates, np.array(floors or [2.5] * len(vertices)) + depth * (x - v) ** 2)


def test_the_regret_of_parabolas_is_their_curvature_times_the_squared_drift() -> None:
    """With the same shifts of seeds at both sizes, each drift is δ, and the regret is c δ²."""
    base, target = bowl([-5.3, -5.1, -4.9]), bowl([-6.1, -5.9, -5.7])
    found = regret(base, target)
    assert found.log2_lr == pytest.approx(-5.1)
    assert found.nats == pytest.approx(DEPTH * 0.8**2, abs=1e-12)
    assert found.percent == pytest.approx(100 * found.nats / found.best)
    # The mean over seeds of a bowl with vertices v_s has a floor higher by var(v) c.
    assert found.best == pytest.approx(2.5 + DEPTH * np.var([-0.2, 0.0, 0.2]), abs=1e-12)
    assert found.nats_interval == pytest.approx((found.nats, found.nats), abs=1e-9)
    assert found.verdict(0.5) == "missed"  # 2 %
    assert found.verdict(2.1) == "met"


def test_the_interval_is_the_jackknifes() -> None:
    """If only the target's vertex differs between seeds: θ_i = c (δ - mean of the others)²."""
    shifts = np.array([-0.3, 0.0, 0.3])
    found = regret(bowl([-5.0] * 3), bowl((-5.5 + shifts).tolist()))
    without = np.array([DEPTH * (0.5 - shifts[[j for j in range(3) if j != i]].mean()) ** 2
                        for i in range(3)])  # fmt: skip
    error = math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert found.nats == pytest.approx(DEPTH * 0.25)
    assert found.nats_interval[1] == pytest.approx(found.nats + 4.302653 * error, rel=1e-6)
    assert found.nats_interval[0] == 0.0, "no regret is below 0"
    assert found.nats - 4.302653 * error < 0.0


def test_seeds_that_disagree_decide_nothing() -> None:
    found = regret(bowl([-5.0] * 3), bowl([-5.9, -5.5, -5.1]))
    low, high = found.percent_interval
    assert low < 0.5 < high
    assert found.verdict(0.5) == "undecided"
    assert found.verdict(100.0) == "met"
    assert regret(bowl([-5.0] * 3), bowl([-7.1, -7.0, -6.9])).verdict(0.5) == "missed"
    one = regret(bowl([-5.0]), bowl([-7.0]))
    assert one.nats == pytest.approx(0.32)
    assert math.isnan(one.percent_interval[0])
    assert one.verdict(0.5) == "undecided", "one seed has no interval"


def test_a_flat_basin_drifts_without_regret() -> None:
    flat = 0.001
    rising = [2.4, 2.5, 2.6]  # offsets common to all losses of a seed do not affect the rate
    base = bowl([-4.1, -4.0, -3.9], depth=flat, floors=rising)
    target = bowl([-6.2, -6.0, -5.8], depth=flat, floors=rising)
    assert drift({16: base, 128: target}) == pytest.approx(2.0)
    found = regret(base, target)
    assert found.nats == pytest.approx(0.004, abs=1e-12)
    assert found.percent_interval[1] < 0.5
    assert found.verdict(0.5) == "met"


@pytest.mark.parametrize("noise", [0.002, 0.008])
def test_intervals_hold_the_regret_about_as_often_as_they_say(noise: float) -> None:
    """Of 200 simulated sweeps of three seeds, whose true regret is 0.02 nats."""
    random, truth = np.random.default_rng(0), DEPTH * 0.5**2
    held = missed = 0
    for _ in range(200):
        common = random.normal(0.0, 0.01, (1, 3))

        def made(vertex: float, common: NDArray[np.float64] = common) -> Sweep:
            luck = random.normal(0.0, noise, (len(GRID), 3))
            return Sweep(GRID, bowl([vertex] * 3).losses_RS + common + luck)

        low, high = (found := regret(made(-5.1), made(-5.6))).nats_interval
        held += low <= truth <= high
        missed += found.verdict(100 * 0.03 / 2.5) == "missed"  # the truth is below that
    assert held >= 170, "85 % of them at least"
    assert missed <= 5


def test_the_loss_between_rates() -> None:
    x = np.array(GRID)
    quadratic = bowl([-5.3])
    for place in (-7.8, -6.1, -5.3, -4.9, -2.2):
        assert loss_at(quadratic, place) == pytest.approx(2.5 + DEPTH * (place + 5.3) ** 2)
    other = Sweep(GRID, (2.5 + 0.1 * np.abs(x + 5.0) ** 3)[:, None])
    for n, rate in enumerate(GRID):  # passes through every point, and is continuous there
        assert loss_at(other, rate) == pytest.approx(other.losses_RS[n, 0])
        for beside in (rate - 1e-9, rate + 1e-9):
            if GRID[0] <= beside <= GRID[-1]:
                assert loss_at(other, beside) == pytest.approx(other.losses_RS[n, 0], abs=1e-6)
    assert math.isnan(loss_at(quadratic, -8.1))
    assert math.isnan(loss_at(quadratic, -1.9))


def test_what_diverged_is_an_infinite_regret_and_its_neighbourhood_an_unknown_one() -> None:
    losses = bowl([-6.0] * 3).losses_RS.copy()
    losses[np.array(GRID) >= -4.0] = math.inf
    target = Sweep(GRID, losses)
    assert loss_at(target, -3.8) == math.inf
    assert math.isnan(loss_at(target, -4.2)), "between one that trained and one that did not"
    assert loss_at(Sweep(GRID[:9], losses[:9]), -3.2) == math.inf, "above one that diverged"
    found = regret(bowl([-3.3] * 3), target)
    assert found.nats == math.inf
    assert found.verdict(1e9) == "missed"
    assert found.describe()["diverged"] is True
    assert found.describe()["nats"] is None
    beside = regret(bowl([-4.2] * 3), target)
    assert "beside one that diverged" in str(beside.problem)
    assert beside.verdict(0.5) == "undecided"
    third = Sweep((-6.0, -5.5, -5.0), np.array([[2.0], [1.9], [math.inf]]))
    assert loss_at(third, -5.75) == pytest.approx(1.95), "the chord, where the third diverged"


def test_sizes_without_a_best_rate_have_no_regret() -> None:
    edge, inside = bowl([-9.0] * 2), bowl([-5.0] * 2)
    assert "carried from has no best one" in str(regret(edge, inside).problem)
    found = regret(inside, edge)
    assert "the size has no best rate: the best rate is the least" in str(found.problem)
    assert math.isnan(found.nats)
    assert found.verdict(0.5) == "undecided"


def test_regrets_are_of_all_sizes_but_the_first() -> None:
    found = regrets({16: bowl([-5.0] * 3), 32: bowl([-5.5] * 3), 64: bowl([-6.0] * 3)})
    assert [*found] == [32, 64]
    assert isinstance(found[32], Regret)
    assert found[64].nats == pytest.approx(4 * found[32].nats)


def test_a_share_of_anothers_regret() -> None:
    """0.16 of it is at most a fifth and 0.36 is not; ambiguous seeds are undecided."""
    ours, theirs = bowl([-5.0] * 3), (bowl([-5.0] * 3), bowl([-6.0] * 3))
    assert against((ours, bowl([-5.4] * 3)), theirs) == "met"
    assert against((ours, bowl([-5.6] * 3)), theirs) == "missed"
    assert against((ours, bowl([-5.8, -5.4, -5.0])), theirs) == "undecided"
    losses = bowl([-6.0] * 3).losses_RS.copy()
    losses[np.array(GRID) >= -5.5] = math.inf
    assert against((ours, bowl([-5.6] * 3)), (bowl([-4.1] * 3), Sweep(GRID, losses))) == "met"
    losses[np.array(GRID) == -5.5] = 2.6
    diverging = (bowl([-4.1] * 3), Sweep(GRID, losses))
    assert against((ours, bowl([-5.6] * 3)), diverging) == "met"
    assert against(diverging, theirs) == "missed"
    assert against(diverging, diverging) == "undecided"


def test_verdicts_and_intervals() -> None:
    assert verdict((0.1, 0.5), 0.5) == "met"
    assert verdict((0.51, 0.9), 0.5) == "missed"
    assert verdict((0.1, 0.9), 0.5) == "undecided"
    assert verdict((math.nan, math.nan), 0.5) == "undecided"
    values = np.array([1.0, 2.0, 6.0])  # the jackknife's error of a mean is s / √n
    low, high = jackknife(lambda seeds: float(values[list(seeds)].mean()), 3, 3.0)
    reach = 4.302653 * values.std(ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((3.0 - reach, 3.0 + reach), rel=1e-6)
    assert math.isnan(jackknife(lambda seeds: 1.0, 1, 1.0)[0])
    assert math.isnan(jackknife(lambda seeds: math.inf, 3, 1.0)[0])
