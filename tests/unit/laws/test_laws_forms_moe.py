"""MoE laws against statements of their papers, and on Clark's routed models."""

from __future__ import annotations

import csv
import gzip

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, fit, predict, require_identified
from allometry.laws.forms.moe import (
    Clark,
    EfficiencyLeverage,
    Granularity,
    effective_experts,
)
from allometry.laws.observations import Observations
from law_data import law_data

LING = EfficiencyLeverage.published["ling"]


def leverage(activation: float, granularity: float, flops: float) -> float:
    rows = Observations.of({"activation": [activation], "granularity": [granularity], "C": [flops]})
    return float(predict(EfficiencyLeverage(), LING, rows)[0])


def test_leverage_is_what_the_paper_says() -> None:
    assert leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.005)  # "more than 7 times"
    best = 2.0 ** (-LING["beta"] / (2.0 * LING["gamma"]))  # for any A and C
    assert best == pytest.approx(11.3, abs=0.05)  # "about 12"
    assert leverage(0.031, best, 1e22) == max(
        leverage(0.031, g, 1e22) for g in (2.0, 8.0, best, 16.0, 64.0)
    )


def test_other_bases_of_logarithms_would_be_off_by_far() -> None:
    # The same formula with natural logarithms of C and G.
    exponent = LING["a"] + LING["d"] * np.log(1e22)
    exponent += LING["gamma"] * np.log(12) ** 2 + LING["beta"] * np.log(12)
    assert (0.031 + LING["A_start"]) ** exponent > 1000


def test_experts_saturate_between_their_limits() -> None:
    assert effective_experts(1.0, 2.0, 300.0) == pytest.approx(2.0)
    assert effective_experts(1e9, 2.0, 300.0) == pytest.approx(300.0, rel=1e-5)
    # Without saturation each expert counts.
    assert effective_experts(64.0, 1.0, 1e15) == pytest.approx(64.0)


def routed(router: str) -> Observations:
    """Return the last evaluation of each run with this router and of the dense runs (E = 1)."""
    last: dict[str, dict[str, str]] = {}
    with gzip.open(law_data("routing_clark") / "curves.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            before = last.get(row["hyper_id"])
            if before is None or float(row["step"]) > float(before["step"]):
                last[row["hyper_id"]] = row
    kept = [
        row
        for row in last.values()
        if row["router_type"] in (router, "Dense")
        and (row["k"], row["routing_frequency"], row["seed"]) == ("1", "0.5", "42")
    ]
    names = {"N": "dense_parameter_count", "experts": "num_experts", "loss": "loss_validation"}
    return Observations.of(
        {name: [float(row[column]) for row in kept] for name, column in names.items()}
    )


# Held out at 1.3B: mean and largest error, percent, as measured here.
@pytest.mark.parametrize(
    ("router", "mean", "largest"),
    [("S-Base", 1.97, 2.80), ("RL-R", 1.97, 2.80), ("Hash", 1.88, 2.78)],
)
def test_small_routed_models_predict_the_largest(router: str, mean: float, largest: float) -> None:
    rows = routed(router)
    assert len(rows) in (56, 58, 59)
    small = rows["N"] < 1e9
    found = fit(Clark(), rows.take(small), FitOptions(loss="square"))
    assert found.certificate.agreeing >= 0.9 * found.certificate.finished  # uninformed starts
    assert not found.certificate.at_bounds
    require_identified(found)
    large = rows.take(~small)
    error = 100.0 * np.abs(found.predict(large) / large["loss"] - 1.0)
    assert error.mean() <= 2.1
    assert (error.mean(), error.max()) == pytest.approx((mean, largest), abs=0.01)


def test_routed_coefficients_of_all_sizes() -> None:
    found = fit(Clark(), routed("S-Base"), FitOptions(loss="square"))
    expected = {"a": -0.083, "b": -0.118, "c": 0.0099, "d": 1.114, "E_start": 2.07}
    for name, value in expected.items():
        assert found.values[name] == pytest.approx(value, rel=6e-3), name
    assert 100.0 * np.abs(np.expm1(found.residuals())).mean() == pytest.approx(0.617, abs=0.005)


def test_dense_models_alone_do_not_say_what_experts_do() -> None:
    # E = 1 everywhere does not identify b, c, E_start and E_max.
    rows = Observations.of(
        {
            "N": [1e7, 2e7, 4e7, 8e7, 1.6e8, 3.2e8, 6.4e8],
            "experts": [1.0] * 7,
            "loss": [4.0, 3.8, 3.6, 3.4, 3.25, 3.1, 3.0],
        }
    )
    found = fit(Clark(), rows, FitOptions(loss="square", starts=16))
    with pytest.raises(UserError, match=r"cannot identify .*\bb\b.* of clark_moe"):
        require_identified(found)


def test_finer_experts_help_less_and_less() -> None:
    values = Granularity.published["krajewski"]
    rows = Observations.of(
        {"N": [1e9] * 5, "D": [2e10] * 5, "granularity": [1.0, 2.0, 4.0, 8.0, 16.0]}
    )
    gains = -np.diff(predict(Granularity(), values, rows))
    assert (gains > 0.0).all()
    assert (np.diff(gains) < 0.0).all()
    # Only (g/G^gamma) changes: the gain of a doubling shrinks by 2^gamma.
    np.testing.assert_allclose(gains[:-1] / gains[1:], 2.0 ** values["gamma"])
