"""The quality-quantity law: against its definition by epochs, mixed pools, recovered."""

from __future__ import annotations

import math

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import check_slopes, noisy

ONE = form_named("quality_pools:good")
TWO = form_named("quality_pools:good,poor")
ONE_TRUE = {"d": 0.1, "D0": 1e5, "b_good": 0.2, "tau_good": 3.0}
TWO_TRUE = {**ONE_TRUE, "b_poor": 0.12, "tau_poor": 6.0}


def by_epochs(
    seen: float, pools: list[float], b: list[float], tau: list[float], d: float, scale: float
) -> float:
    """Return the law as stated in 2404.07177, one epoch after another."""
    total = sum(pools)
    f = [pool / total for pool in pools]
    taus = [t / part for t, part in zip(tau, f, strict=True)]

    def rate(epoch: int) -> float:
        return sum(p * x * 0.5 ** (epoch / t) for p, x, t in zip(f, b, taus, strict=True))

    y = (min(seen, total) / scale) ** -rate(0)
    epoch, before = 1, total
    while before < seen:
        after = min(total * (epoch + 1), seen)
        y *= (after / before) ** -rate(epoch)
        epoch, before = epoch + 1, after
    return d + y


@pytest.mark.parametrize("epochs", [0.25, 1.0, 1.5, 2.0, 7.3, 10.0])
def test_it_is_the_definition(epochs: float) -> None:
    # Together with a row of many epochs, because rows are computed jointly.
    rows = Observations.of({"D": [1e7 * epochs, 3e8], "good": [1e7, 1e7]})
    expected = [by_epochs(seen, [1e7], [0.2], [3.0], 0.1, 1e5) for seen in rows["D"]]
    assert predict(ONE, ONE_TRUE, rows) == pytest.approx(expected, rel=1e-13)
    rows = Observations.of({"D": [1.6e7 * epochs], "good": [1e7], "poor": [6e6]})
    expected = [by_epochs(1.6e7 * epochs, [1e7, 6e6], [0.2, 0.12], [3.0, 6.0], 0.1, 1e5)]
    assert predict(TWO, TWO_TRUE, rows) == pytest.approx(expected, rel=1e-13)


def test_pools_of_one_size_have_the_papers_half_life() -> None:
    """Two equal pools: the mean of b, each with twice its tau."""
    rows = Observations.of({"D": [8e7], "good": [1e7], "poor": [1e7]})
    y = (2e7 / 1e5) ** -0.16
    for epoch in (1, 2, 3):
        b = 0.5 * (0.2 * 0.5 ** (epoch / 6.0) + 0.12 * 0.5 ** (epoch / 12.0))
        y *= ((epoch + 1) / epoch) ** -b
    assert predict(TWO, TWO_TRUE, rows) == pytest.approx([0.1 + y], rel=1e-13)


def test_a_pool_that_is_not_used_does_not_matter() -> None:
    seen = [2e7, 2e8]
    alone = predict(ONE, ONE_TRUE, Observations.of({"D": seen, "good": [1e7, 1e7]}))
    rows = Observations.of({"D": seen, "good": [1e7, 1e7], "poor": [0.0, 0.0]})
    assert predict(TWO, TWO_TRUE, rows) == pytest.approx(alone, rel=1e-14)


def test_few_epochs_want_the_best_pool_and_many_want_both() -> None:
    def losses(seen: float) -> np.ndarray:
        rows = {"D": [seen] * 2, "good": [1e7, 1e7], "poor": [0.0, 1e7]}
        return predict(TWO, TWO_TRUE, Observations.of(rows))

    assert losses(1e7).argmin() == 0
    assert losses(1e9).argmin() == 1


def runs() -> Observations:
    pools = ((1e7, 0.0), (0.0, 1e7), (1e7, 1e7), (3e7, 1e7))
    rows = [(sum(p) * epochs, *p) for p in pools for epochs in np.geomspace(0.5, 30, 12)]
    seen, good, poor = zip(*rows, strict=True)
    return Observations.of({"D": seen, "good": good, "poor": poor})


def test_slopes() -> None:
    check_slopes(TWO, TWO_TRUE, runs())


def test_parameters_are_found_again_from_pools_together() -> None:
    found = fit(TWO, noisy(TWO, TWO_TRUE, runs(), 0.002), FitOptions(starts=32))
    assert found.certificate.agreeing >= 4
    assert not found.certificate.at_bounds
    error = np.abs(found.predict(runs()) / predict(TWO, TWO_TRUE, runs()) - 1.0)
    assert error.max() < 0.005
    for name, tolerance in (("b_good", 0.05), ("b_poor", 0.05), ("tau_good", 0.3)):
        assert math.log(found.values[name] / TWO_TRUE[name]) == pytest.approx(0, abs=tolerance)


def test_rows_that_cannot_be() -> None:
    for columns, words in (
        ({"D": [1e7], "good": [0.0], "poor": [0.0]}, "row 1 has D=1e\\+07 of pools good=0"),
        ({"D": [1e7], "good": [1e7], "poor": [-1.0]}, "poor=-1"),
        ({"D": [1e12], "good": [1e7], "poor": [0.0]}, "up to 1000 epochs"),
        ({"D": [1e7], "good": [1e7]}, "no 'poor'; name theirs: quality_pools:COLUMN"),
        ({"D": [0.0], "good": [1e7], "poor": [0.0]}, "D of row 1 is 0.0"),
    ):
        with pytest.raises(UserError, match=words):
            TWO.prepare(Observations.of(columns))
