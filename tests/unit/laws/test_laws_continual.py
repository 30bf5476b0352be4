"""The share of a new domain: D-CPT's choice under a bound, CMR's critical ratios."""

from __future__ import annotations

import json

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.continual import (
    choose_ratio,
    critical_mixture_ratio,
    critical_shares,
    ratio_interval,
)
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import noisy
from law_data import law_data


class Line:
    """Model that predicts low + slope x of one column."""

    def __init__(self, column: str, low: float, slope: float) -> None:
        self.column, self.low, self.slope = column, low, slope

    def predict(self, observations: Observations) -> np.ndarray:
        return self.low + self.slope * observations[self.column]


def test_the_choice_is_where_the_bound_is_met() -> None:
    # General loss 3 - 0.5 (1 - share): 2.8 at a share of 0.6.
    general, domain = Line("r", 3.0, -0.5), Line("r", 2.0, -1.0)
    chosen = choose_ratio(general, domain, at={"N": 1e9}, bound=2.8)
    assert chosen.share == pytest.approx(0.6, abs=1e-9)
    assert chosen.general_loss == pytest.approx(2.8, abs=1e-9)
    assert chosen.domain_loss == pytest.approx(1.4, abs=1e-9)
    assert chosen.bounded
    free = choose_ratio(general, domain, at={}, bound=5.0, high=0.9)
    assert (free.share, free.bounded) == (0.9, False)


def test_shares_beyond_one_that_is_not_within_the_bound_do_not_count() -> None:
    class Bump:
        def predict(self, observations: Observations) -> np.ndarray:
            share = 1.0 - observations["r"]
            return np.where((share > 0.3) & (share < 0.7), np.nan, 2.0)

    chosen = choose_ratio(Bump(), Bump(), at={}, bound=2.5)
    assert chosen.share == pytest.approx(0.3, abs=1e-9)


def test_no_share_within_the_bound_is_refused() -> None:
    line = Line("r", 3.0, -0.5)
    with pytest.raises(UserError, match=r"2\.5000 with a domain share of 0, above bound=2\.4"):
        choose_ratio(line, line, at={}, bound=2.4)
    with pytest.raises(UserError, match=r"low=0\.8 and high=0\.2 must be shares"):
        choose_ratio(line, line, at={}, bound=2.4, low=0.8, high=0.2)


def test_the_interval_of_the_choice_covers_the_true_one() -> None:
    law = form_named("d_cpt")
    fixed = {"A": 0.0, "alpha": 0.3, "B": 0.0, "beta": 0.3, "eta": 1.0}
    true = {**fixed, "E": 2.7, "C": 0.02, "gamma": 1.0, "eps": 0.04}
    shares = np.linspace(0.0, 1.0, 25)
    at = {"N": 1e9, "D": 1e10}
    columns = {"r": shares, **{name: np.full(25, value) for name, value in at.items()}}
    rows = noisy(law, true, Observations.of(columns), 0.002)
    samples = bootstrap(fit(law, rows, FitOptions(fixed=fixed, starts=16)), samples=60)
    low, high = ratio_interval(samples, samples, at=at, bound=2.85)
    exact = 1.0 - (0.02 / 0.15 - 0.04)  # 2.7 + .02 / (1 - share + .04) = 2.85
    assert low < exact < high
    assert 0.001 < high - low < 0.1
    assert ratio_interval(samples, samples, at=at, bound=1.0, low=0.1) == (0.1, 0.1)


def test_published_choice_for_chemistry() -> None:
    """2406.01375, usage 1: 1.8B, 10B tokens of chemistry, at most 3 % more general loss: .924."""
    path = law_data("published_tables") / "published.json"
    tables = json.loads(path.read_text(encoding="utf-8"))
    table = tables["dcpt_table5_chemistry_qwen1.5-1.8B_D10B"]
    r = np.array(table["r_d"])
    at = {"N": 1.8e9, "D": 1e10}
    fits = []
    for shares, losses in ((1 - r, table["L_general"]), (r, table["L_domain"])):
        rows = Observations.of(
            {**{k: np.full(len(r), v) for k, v in at.items()}, "r": shares, "loss": losses}
        )
        # One size and one horizon: the law in r alone.
        fixed = {"A": 0.0, "alpha": 0.3, "B": 0.0, "beta": 0.3, "eta": 1.0}
        fits.append(fit(form_named("d_cpt"), rows, FitOptions(fixed=fixed, starts=32)))
    bound = (1 + table["T"]) * table["L_g0"]
    chosen = choose_ratio(*fits, at=at, bound=bound, low=0.9)
    assert chosen.share == pytest.approx(table["published_r_d"], abs=0.001)
    assert chosen.domain_loss == pytest.approx(1.7291, abs=0.001)
    assert chosen.bounded


def test_critical_shares_between_those_that_were_run() -> None:
    # Rises of 0.02, 0.04 and 0.08 per 1e9 tokens at shares 1/4, 1/2 and 1.
    general = {share: Line("D", 0.0, 0.08 * share / 1e9) for share in (1.0, 0.25, 0.5)}
    found = critical_shares(general, [0.5e9, 1e9, 2e9], bound=0.05)
    assert found.shares_T == pytest.approx([1.0, 0.625, 0.3125])
    assert found.censored_T.tolist() == [True, False, False]
    assert found.observations()["R"] == pytest.approx([0.625, 0.3125])
    with pytest.raises(UserError, match=r"rise by 0.0800 after 4e\+09 tokens at the least share"):
        critical_shares(general, [4e9])
    with pytest.raises(UserError, match="two or more"):
        critical_shares({0.5: Line("D", 0.0, 1.0)}, [1e9])


def test_a_critical_ratio_from_curves_to_a_later_horizon() -> None:
    """All of 2407.17467 on synthetic curves: rises by share, ratios by horizon, a later one."""
    random = np.random.default_rng(0)
    tokens = np.geomspace(0.2e9, 10e9, 40)
    fits = {}
    for share in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8):
        rise = 0.16 * share * (tokens / 0.2e9) ** 0.25 - 0.02 + 3e-4 * random.standard_normal(40)
        rows = Observations.of({"D": tokens, "dloss": rise})
        fits[share] = fit(form_named("cmr_general"), rows, FitOptions(starts=16))
    found = critical_shares(fits, np.geomspace(1e9, 10e9, 8).tolist())
    assert not found.censored_T.any()
    critical = fit(form_named("cmr_critical"), found.observations(), FitOptions(starts=32))
    expected = 0.07 / (0.16 * (20e9 / 0.2e9) ** 0.25)
    assert critical_mixture_ratio(critical, 20e9) == pytest.approx(expected, abs=0.01)
    with pytest.raises(UserError, match="which is no share"):
        critical_mixture_ratio(Line("D", 2.0, 0.0), 1e9)
