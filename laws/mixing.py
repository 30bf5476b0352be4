"""Mixture of the least predicted loss."""

# K domains, S starts, V validation sets

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.fit.engine import predict
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

STEP = 1e-6
"""Step of the forward differences, in shares."""
PRECISION = 1e-10
KEPT = 1e-6
"""Tolerance of a loss above its bound, for rounding."""


class Predictor(Protocol):
    """Law that predicts a target for rows, such as a ``Fit``."""

    def predict(self, observations: Observations) -> Array:
        """Return the target [n]."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares by domain, the minimal weighted loss, and the loss of each validation set.

    ``agreeing`` of ``starts`` searches ended at this loss (within 1e-6 of it).
    """

    shares: dict[str, float]
    loss: float
    losses: dict[str, float]
    agreeing: int
    starts: int


def optimal_mixture(
    laws: Mapping[str, Predictor],
    domains: Sequence[str],
    *,
    weights: Mapping[str, float] | None = None,
    least: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
    at: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
    starts: int = 16,
    seed: int = 0,
) -> Mixture:
    """Return the shares r that minimize ``sum_v weights_v L_v(r)``, sum 1, least <= r <= most.

    ``laws``: a fit for each validation set, which reads columns ``domains``; ``weights``: by
    validation set (1 by default), not negative; ``least`` and ``most``: bounds of some domains (0
    and 1 by default; ``most`` = U/D keeps a domain of U tokens from being repeated); ``at``: other
    columns of the laws (N, D), equal for every mixture; ``bounds``: upper bounds of the losses of
    some validation sets. Sequential least squares from points spread over the simplex: sums of
    mixing_exponential laws are convex, so all starts agree; other laws may have several minima.
    Raises UserError: a name is unknown, a weight negative, or no mixture is found.
    """
    from scipy.optimize import minimize

    weight_V = _weights(laws, weights)
    low_K, high_K = _bounds(domains, least, most)
    if starts < 1:
        raise UserError(f"starts={starts} must be at least 1")

    def value_and_slopes(shares_K: Array) -> tuple[float, Array]:
        steps = np.concatenate([np.zeros((1, len(domains))), STEP * np.eye(len(domains))])
        total_n = weight_V @ _losses(laws, domains, at, np.clip(shares_K, 0.0, 1.0) + steps)
        return float(total_n[0]), (total_n[1:] - total_n[0]) / STEP

    slack, constraints = _constraints(laws, domains, at, bounds or {})
    random, optima, even = np.random.default_rng(seed), [], np.ones(len(domains))
    for number in range(starts):
        start_K = even / len(domains) if number == 0 else random.dirichlet(even)
        result = minimize(
            value_and_slopes,
            into_simplex(start_K, low_K, high_K),
            jac=True,
            method="SLSQP",
            bounds=list(zip(low_K, high_K, strict=True)),
            constraints=constraints,
            options={"maxiter": 500, "ftol": PRECISION},
        )
        end_K = into_simplex(np.asarray(result.x, np.float64), low_K, high_K)
        each_V = _losses(laws, domains, at, end_K[None])[:, 0]
        if (slack(end_K) < -KEPT).any():
            continue
        optima.append((float(weight_V @ each_V), end_K, each_V))
    if not optima:
        said = ", ".join(f"{name} at most {most:.4f}" for name, most in (bounds or {}).items())
        raise UserError(f"no mixture within the shares keeps {said}; allow more or widen them")
    loss, shares_K, each_V = min(optima, key=lambda one: one[0])
    shares = dict(zip(domains, shares_K.tolist(), strict=True))
    losses = dict(zip(laws, each_V.tolist(), strict=True))
    agreeing = sum(one[0] <= loss + 1e-6 * abs(loss) for one in optima)
    return Mixture(shares, loss, losses, agreeing, starts)


def _constraints(
    laws: Mapping[str, Predictor],
    domains: Sequence[str],
    at: Mapping[str, float] | None,
    limits: Mapping[str, float],
) -> tuple[Callable[[Array], Array], list[dict[str, Any]]]:
    """Return the slack of shares [K] under these loss limits, and all constraints of a search."""
    for name in limits:
        if name not in laws:
            raise UserError(f"bounds names {name!r}, which is none of the laws {', '.join(laws)}")
    bounded = {name: laws[name] for name in limits}
    most_V = np.array(list(limits.values()), np.float64)

    def slack(shares_K: Array) -> Array:
        if not bounded:
            return most_V
        return most_V - _losses(bounded, domains, at, np.clip(shares_K, 0.0, 1.0)[None])[:, 0]

    one: dict[str, Any] = {"type": "eq", "fun": lambda r: r.sum() - 1.0, "jac": np.ones_like}
    return slack, [one, {"type": "ineq", "fun": slack}] if bounded else [one]


def _losses(
    laws: Mapping[str, Predictor],
    domains: Sequence[str],
    at: Mapping[str, float] | None,
    shares_nK: Array,
) -> Array:
    """Return the loss [V, n] that each law predicts for these mixtures."""
    columns = {name: shares_nK[:, i] for i, name in enumerate(domains)}
    others = {name: np.full(len(shares_nK), float(v)) for name, v in (at or {}).items()}
    rows = Observations.of({**columns, **others})
    return np.stack([law.predict(rows) for law in laws.values()])


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a bootstrap as a law."""

    bootstrap: Bootstrap
    index: int

    def predict(self, observations: Observations) -> Array:
        """Return the target [n]."""
        values = {name: float(v[self.index, 0]) for name, v in self.bootstrap.values().items()}
        return predict(self.bootstrap.fit.form, values, observations)


def mixture_intervals(
    bootstraps: Mapping[str, Bootstrap],
    domains: Sequence[str],
    *,
    level: float = 0.95,
    **options: Any,
) -> dict[str, tuple[float, float]]:
    """Return the interval of each domain's share in the best mixture.

    The best mixture is recomputed, from one start, for each sample that exists in all
    ``bootstraps`` (by validation set); ``options``: arguments of ``optimal_mixture``. Raises
    UserError like ``optimal_mixture``.
    """
    number = min((len(bootstrap) for bootstrap in bootstraps.values()), default=0)
    best_BK = []
    for index in range(max(number, 1)):
        laws = {name: Sample(bootstrap, index) for name, bootstrap in bootstraps.items()}
        try:
            best = optimal_mixture(laws, domains, **{"starts": 1, **options})
        except UserError:
            if not options.get("bounds"):
                raise
            continue  # the laws of this sample satisfy the bounds nowhere
        best_BK.append(list(best.shares.values()))
    if 2 * len(best_BK) < number:
        raise UserError(f"only {len(best_BK)} of {number} samples have a mixture within the bounds")
    tail = (1.0 - level) / 2.0
    low_K, high_K = np.quantile(best_BK, [tail, 1.0 - tail], axis=0)
    return {d: (float(low_K[i]), float(high_K[i])) for i, d in enumerate(domains)}


def into_simplex(shares_K: Array, low_K: Array, high_K: Array) -> Array:
    """Return the nearest shares that sum to one within the bounds (by bisection of a shift)."""
    shares_K = np.clip(shares_K, low_K, high_K)
    down, up = -1.0, 1.0
    for _ in range(60):
        shift = 0.5 * (down + up)
        if np.clip(shares_K + shift, low_K, high_K).sum() < 1.0:
            down = shift
        else:
            up = shift
    return np.asarray(np.clip(shares_K + up, low_K, high_K))


def _weights(laws: Mapping[str, Predictor], weights: Mapping[str, float] | None) -> Array:
    if not laws:
        raise UserError("laws is empty; give a fit for at least one validation set")
    given = dict.fromkeys(laws, 1.0) if weights is None else dict(weights)
    if set(given) != set(laws):
        raise UserError(
            f"weights names {', '.join(sorted(given))} and the laws are of "
            f"{', '.join(sorted(laws))}; give one weight for each"
        )
    weight_V = np.array([given[name] for name in laws], np.float64)
    if not (np.isfinite(weight_V).all() and (weight_V >= 0.0).all() and weight_V.sum() > 0.0):
        raise UserError(f"weights={given} must be numbers of at least 0, one of them above")
    return weight_V


def _bounds(
    domains: Sequence[str], least: Mapping[str, float] | None, most: Mapping[str, float] | None
) -> tuple[Array, Array]:
    for name, given in (("least", least or {}), ("most", most or {})):
        unknown = [domain for domain in given if domain not in domains]
        if unknown:
            raise UserError(
                f"{name} names {unknown[0]!r}, which is none of the domains {', '.join(domains)}"
            )
    low_K = np.array([(least or {}).get(domain, 0.0) for domain in domains], np.float64)
    high_K = np.array([min((most or {}).get(domain, 1.0), 1.0) for domain in domains], np.float64)
    possible = low_K.sum() <= 1.0 <= high_K.sum() and (low_K >= 0.0).all()
    if not (possible and (low_K <= high_K).all()):
        raise UserError(
            f"no mixture of {', '.join(domains)} has shares of at least {low_K.tolist()} and at "
            f"most {high_K.tolist()} that sum to 1; widen least or most"
        )
    return low_K, high_K
