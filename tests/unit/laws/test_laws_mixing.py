"""The best mixture of fitted laws, against known optima."""

from __future__ import annotations

import math

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.mixing import into_simplex, mixture_intervals, optimal_mixture
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from law_checks import noisy

DOMAINS = ("web", "code", "books")


class Quadratic:
    """Quadratic law with its minimum at a given mixture."""

    def __init__(self, best: tuple[float, ...], level: float = 2.0) -> None:
        self.best, self.level = best, level

    def predict(self, observations: Observations) -> np.ndarray:
        away = sum((observations[d] - b) ** 2 for d, b in zip(DOMAINS, self.best, strict=True))
        return self.level + np.asarray(away)


class Exponential:
    """c + exp(t r) with known coefficients."""

    def __init__(self, c: float, *t: float) -> None:
        self.c, self.t = c, t

    def predict(self, observations: Observations) -> np.ndarray:
        shares = np.stack([observations[d] for d in DOMAINS], axis=1)
        return self.c + np.exp(shares @ np.array(self.t))


def test_an_interior_optimum_is_found() -> None:
    found = optimal_mixture({"all": Quadratic((0.2, 0.5, 0.3))}, DOMAINS)
    assert list(found.shares.values()) == pytest.approx([0.2, 0.5, 0.3], abs=1e-4)
    assert sum(found.shares.values()) == pytest.approx(1.0, abs=1e-12)
    assert found.loss == pytest.approx(2.0, abs=1e-7)
    assert found.agreeing == found.starts == 16


def test_weights_move_it() -> None:
    laws = {"a": Quadratic((1.0, 0.0, 0.0)), "b": Quadratic((0.0, 1.0, 0.0))}
    found = optimal_mixture(laws, DOMAINS, weights={"a": 3.0, "b": 1.0})
    assert list(found.shares.values()) == pytest.approx([0.75, 0.25, 0.0], abs=1e-4)
    assert found.losses["a"] < found.losses["b"]
    assert found.loss == pytest.approx(3 * found.losses["a"] + found.losses["b"])


def test_bounds_bind() -> None:
    law = {"all": Quadratic((0.0, 1.0, 0.0))}
    found = optimal_mixture(law, DOMAINS, most={"code": 0.4}, least={"web": 0.5})
    assert list(found.shares.values()) == pytest.approx([0.5, 0.4, 0.1], abs=1e-4)


def test_two_exponentials_against_their_stationary_point() -> None:
    # Equal slopes: -4 exp(-4 r) = -2 exp(-2 (1 - r)); the third domain lowers neither loss.
    laws = {"a": Exponential(1.0, -4.0, 0.0, 0.0), "b": Exponential(1.5, 0.0, -2.0, 0.0)}
    found = optimal_mixture(laws, DOMAINS)
    share = (math.log(2.0) + 2.0) / 6.0
    assert list(found.shares.values()) == pytest.approx([share, 1 - share, 0.0], abs=1e-4)
    assert found.agreeing == found.starts


def test_the_better_of_two_minima_is_found() -> None:
    class TwoWells:
        def predict(self, observations: Observations) -> np.ndarray:
            web = observations["web"]
            return (
                2.0
                - np.exp(-(((web - 0.1) / 0.1) ** 2))
                - 1.2 * np.exp(-(((web - 0.9) / 0.1) ** 2))
            )

    found = optimal_mixture({"all": TwoWells()}, DOMAINS, starts=32)
    assert found.shares["web"] == pytest.approx(0.9, abs=1e-3)
    assert found.agreeing < found.starts


def test_the_optimum_of_fitted_laws_is_near_that_of_the_true_ones() -> None:
    shares_nK = np.random.default_rng(0).dirichlet(np.ones(3), 60)
    rows = Observations.of({name: shares_nK[:, i] for i, name in enumerate(DOMAINS)})
    form = form_named(f"mixing_exponential:{','.join(DOMAINS)}")
    fits, true = {}, {}
    for name, t in (("a", (-2.5, 0.3, -0.5)), ("b", (0.2, -2.0, -0.4)), ("c", (0.1, 0.2, -2.0))):
        values = {"c": 1.5, **{f"t_{d}": v for d, v in zip(DOMAINS, t, strict=True)}}
        fits[name] = fit(form, noisy(form, values, rows, 0.002), FitOptions(starts=8))
        true[name] = Exponential(1.5, *t)
    found, best = optimal_mixture(fits, DOMAINS), optimal_mixture(true, DOMAINS)
    at_found = Observations.of({name: [share] for name, share in found.shares.items()})
    assert sum(law.predict(at_found)[0] for law in true.values()) < best.loss * 1.0005
    assert list(found.shares.values()) == pytest.approx(list(best.shares.values()), abs=0.05)


def test_intervals_of_the_best_shares_cover_the_true_ones_and_grow_with_noise() -> None:
    shares_nK = np.random.default_rng(1).dirichlet(np.ones(3), 60)
    rows = Observations.of({name: shares_nK[:, i] for i, name in enumerate(DOMAINS)})
    form = form_named(f"mixing_exponential:{','.join(DOMAINS)}")
    slopes = {"a": (-2.5, 0.3, -0.5), "b": (0.2, -2.0, -0.4)}
    best = optimal_mixture({name: Exponential(1.5, *t) for name, t in slopes.items()}, DOMAINS)
    widths = []
    for noise in (0.001, 0.01):
        samples = {}
        for seed, (name, t) in enumerate(slopes.items()):
            values = {"c": 1.5, **{f"t_{d}": v for d, v in zip(DOMAINS, t, strict=True)}}
            measured = noisy(form, values, rows, noise, seed=seed)
            samples[name] = bootstrap(fit(form, measured, FitOptions(starts=4)), samples=60)
        found = mixture_intervals(samples, DOMAINS)
        low, high = found["web"]
        assert low <= best.shares["web"] <= high
        widths.append(high - low)
    assert 0.0 < 3 * widths[0] < widths[1]


def test_other_columns_are_given_to_the_laws() -> None:
    class NeedsTokens(Quadratic):
        def predict(self, observations: Observations) -> np.ndarray:
            return super().predict(observations) + 1.0 / observations["D"]

    law = {"all": NeedsTokens((0.2, 0.5, 0.3))}
    assert optimal_mixture(law, DOMAINS, at={"D": 4.0}, starts=2).loss == pytest.approx(2.25)
    with pytest.raises(UserError, match="no column 'D'"):
        optimal_mixture(law, DOMAINS)


def test_the_nearest_mixture() -> None:
    low, high = np.array([0.2, 0.0, 0.0]), np.array([1.0, 0.5, 1.0])
    near = into_simplex(np.array([0.0, 0.9, 0.5]), low, high)
    assert near == pytest.approx([0.2, 0.4, 0.4])
    assert near.sum() == pytest.approx(1.0, abs=1e-12)
    assert (near >= low).all()
    assert (near <= high).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"other": 1.0}}, "weights names other and the laws are of all"),
        ({"weights": {"all": -1.0}}, "must be numbers of at least 0"),
        ({"least": {"wiki": 0.1}}, "least names 'wiki', which is none of the domains web"),
        ({"most": {"web": 0.1, "code": 0.1, "books": 0.1}}, "no mixture of web, code, books"),
        ({"least": {"web": 0.9}, "most": {"web": 0.5}}, "no mixture"),
        ({"starts": 0}, "starts=0"),
    ],
)
def test_what_cannot_be_asked(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        optimal_mixture({"all": Quadratic((0.2, 0.5, 0.3))}, DOMAINS, **change)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="laws is empty"):
        optimal_mixture({}, DOMAINS)


def test_a_bound_on_another_loss_binds() -> None:
    """Minimize one loss with a bound on another: both are quadratics with a known solution."""
    laws = {"domain": Quadratic((1.0, 0.0, 0.0)), "general": Quadratic((0.0, 1.0, 0.0))}
    options = {"weights": {"domain": 1.0, "general": 0.0}, "bounds": {"general": 2.5}}
    found = optimal_mixture(laws, DOMAINS, **options)
    assert found.losses["general"] == pytest.approx(2.5, abs=1e-5)
    assert list(found.shares.values()) == pytest.approx([0.5, 0.5, 0.0], abs=1e-3)
    with pytest.raises(UserError, match="no mixture within the shares keeps general at most"):
        optimal_mixture(laws, DOMAINS, bounds={"general": 1.9})
    with pytest.raises(UserError, match="bounds names 'books'"):
        optimal_mixture(laws, DOMAINS, bounds={"books": 1.9})
