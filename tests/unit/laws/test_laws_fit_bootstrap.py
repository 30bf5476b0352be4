"""Bootstrap fits equal fits to the resampled rows, and intervals cover."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.engine import Fit, FitOptions, fit, predict
from allometry.laws.fit.refit import refit
from allometry.laws.forms.dense import Chinchilla
from allometry.laws.observations import Observations

TRUE = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
TARGET = Observations.of({"N": [4e9], "D": [1.6e11]})
FORM = Chinchilla()


def ladder(
    seed: int, sizes: int = 8, horizons: int = 8, seeds: int = 1, noise: float = 3e-3
) -> Observations:
    """Return the runs of a ladder; seeds of one rung form a group."""
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 4e10, horizons))
    n, d = np.repeat(n.ravel(), seeds), np.repeat(d.ravel(), seeds)
    clean = predict(FORM, TRUE, Observations.of({"N": n, "D": d}))
    loss = clean * np.exp(np.random.default_rng(seed).normal(0.0, noise, len(n)))
    groups = [str(rung) for rung in np.repeat(np.arange(sizes * horizons), seeds)]
    return Observations.of({"N": n, "D": d, "loss": loss}, groups)


@pytest.fixture(scope="module")
def found() -> Fit:
    return fit(FORM, ladder(0))


@pytest.fixture(scope="module")
def samples(found: Fit) -> Bootstrap:
    return bootstrap(found, 100)


def test_weights_are_repeated_rows(found: Fit) -> None:
    counts = np.random.default_rng(1).multinomial(64, np.full(64, 1 / 64), 3).astype(float)
    problem = found.problem()
    center_P = problem.coordinates(found.values)
    x_BP = refit(problem, found.options.make_loss(), center_P, counts, 2, 0)
    for x_P, count in zip(x_BP, counts, strict=True):
        rows = np.repeat(np.arange(64), count.astype(int))
        repeated = fit(FORM, found.observations.take(rows))
        np.testing.assert_allclose(x_P, problem.coordinates(repeated.values), atol=1e-5)


def test_rows_of_a_group_are_drawn_together() -> None:
    """Groups of equal copies: one copy's bootstrap; ungrouped, intervals would
    be far too narrow."""
    once = ladder(0, 6, 6)
    rows = np.repeat(np.arange(36), 9)
    together = once.take(rows)
    apart = Observations(together.columns, tuple(str(i) for i in range(len(rows))))
    widths = [
        np.ptp(bootstrap(fit(FORM, rows), 100).interval("alpha"))
        for rows in (once, together, apart)
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[2] < 0.5 * widths[0]


def test_a_seed_fixes_the_samples(found: Fit, samples: Bootstrap) -> None:
    again, other = bootstrap(found, 100), bootstrap(found, 100, seed=1)
    assert np.array_equal(again.values_BP, samples.values_BP)
    assert not np.array_equal(other.values_BP, samples.values_BP)
    assert samples.failed == 0
    assert len(samples) == 100


def test_intervals_are_percentiles_and_widen_with_their_level(samples: Bootstrap) -> None:
    low, high = samples.interval("alpha", 0.9)
    inside = (samples.values_BP[:, 3] >= low) & (samples.values_BP[:, 3] <= high)
    assert inside.sum() == 90
    wider = samples.interval("alpha", 0.99)
    assert wider[0] < low < high < wider[1]
    narrow, wide = (samples.predict_interval(TARGET, noise=noise) for noise in (False, True))
    assert np.ptp(wide) > np.ptp(narrow) > 0.0


def test_fixed_parameters_stay(found: Fit) -> None:
    fixed = fit(FORM, found.observations, FitOptions(fixed={"E": 1.8}))
    assert bootstrap(fixed, 20).interval("E") == (1.8, 1.8)
    assert np.ptp(bootstrap(fixed, 20).interval("A")) > 0.0


def test_what_cannot_be_resampled_is_refused(found: Fit) -> None:
    alone = Observations(found.observations.columns, ("only",) * 64)
    with pytest.raises(UserError, match="all 64 observations belong to group 'only'"):
        bootstrap(fit(FORM, alone))
    with pytest.raises(UserError, match="1 bootstrap samples"):
        bootstrap(found, 1)


def coverage(simulations: int, samples: int, **shape: int) -> dict[str, float]:
    """Return coverage of 95 % intervals: of parameters, of the loss, of a new run's loss."""
    truth = predict(FORM, TRUE, TARGET)[0]
    draw = np.random.default_rng(0)
    hits = dict.fromkeys([*TRUE, "loss", "new run"], 0)
    for simulation in range(simulations):
        resampled = bootstrap(fit(FORM, ladder(1000 + simulation, **shape)), samples)
        for name, value in TRUE.items():
            low, high = resampled.interval(name)
            hits[name] += low <= value <= high
        for name, noise in (("loss", False), ("new run", True)):
            low_n, high_n = resampled.predict_interval(TARGET, noise=noise)
            new = truth * np.exp(draw.normal(0.0, 3e-3)) if noise else truth
            hits[name] += bool(low_n[0] <= new <= high_n[0])
    return {name: count / simulations for name, count in hits.items()}


def test_intervals_cover_in_a_few_simulations() -> None:
    """20 simulations at 95 %: fewer than 16 hits have probability .3 %; not all may be hits."""
    rates = coverage(20, 100)
    assert min(rates.values()) >= 16 / 20, rates
    assert np.mean(list(rates.values())) < 1.0, rates


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{}, {"sizes": 5, "horizons": 4, "seeds": 2}], ids=["8x8", "5x4x2"]
)
def test_intervals_cover_at_their_rate(shape: dict[str, int]) -> None:
    """Of 200 simulations; three standard errors of a rate of .95 are .046."""
    rates = coverage(200, 200, **shape)
    assert all(0.90 <= rate <= 0.99 for rate in rates.values()), rates


def test_a_value_at_the_edge_of_its_interval_is_told(found: Fit, samples: Bootstrap) -> None:
    assert not any(samples.at_edge(name) for name in samples.names)
    column = samples.names.index("E")
    low, high = samples.interval("E")
    for moved, edge in ((low - found.values["E"], True), (0.1 * (high - low), False)):
        values_BP = samples.values_BP.copy()
        values_BP[:, column] -= moved
        assert replace(samples, values_BP=values_BP).at_edge("E") is edge
    exact = fit(FORM, ladder(0, noise=0.0))
    assert not any(bootstrap(exact, 20).at_edge(name) for name in samples.names)
