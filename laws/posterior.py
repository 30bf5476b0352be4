"""Posterior of the annealing law given one run's curve and a prior."""

# n rows, A exponents, M memories; a cell is one pair of these

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ALPHAS = np.geomspace(0.08, 1.6, 40)
MEMORIES = np.geomspace(5.0, 2e4, 28)
_ROUNDS = 5  # of noise and outlier weights, each from the previous fit
_OUTLIER = 3.0  # deviations above which a row has a smaller weight
_MOST_PERSISTENCE = 0.97


@dataclass(frozen=True, slots=True)
class Normal:
    """Normal distribution of a quantity."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class Prior:
    """Prior of a curve's law, and its source.

    ``gain``: of the target's decay, as a share of the last loss. ``log_alpha``, ``log_memory``:
    natural logs of the law's exponent and memory (in steps). ``level``: L0 over the last loss.
    """

    gain: Normal
    log_alpha: Normal
    log_memory: Normal
    level: Normal
    source: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Averaged rows of curves: loss, S1, S2 at each memory; ``starts``: first rows of curves."""

    loss_n: Array
    s1_n: Array
    s2_Mn: Array
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Posterior:
    """Fitted law in every cell and the cells' probabilities.

    Columns of coefficients: level L0, progress A·s1^−alpha, gain C·reference_M, as shares of
    ``scale``, the loss of the last row. ``sd``: of a row's residual, relative; ``persistence``:
    correlation of neighbouring residuals; ``effective_rows``: equivalent number of independent
    rows.
    """

    scale: float
    s1: float
    reference_M: Array
    probability_AM: Array
    coefficients_AM3: Array
    covariance_AM33: Array
    sd: float
    persistence: float
    effective_rows: float
    weights_n: Array

    def predict(self, s1: float, s2_M: Array) -> tuple[Array, Array]:
        """Return the mean and the variance of the loss at these areas in each cell [A, M]."""
        parts = np.empty(self.coefficients_AM3.shape)
        parts[..., 0] = 1.0
        parts[..., 1] = ((s1 / self.s1) ** -ALPHAS)[:, None]
        parts[..., 2] = -(s2_M / self.reference_M)[None]
        mean_AM = (parts * self.coefficients_AM3).sum(-1)
        spread_AM3 = (self.covariance_AM33 * parts[..., None, :]).sum(-1)
        return self.scale * mean_AM, self.scale**2 * (parts * spread_AM3).sum(-1)

    def moments(self, values_AM: Array, variances_AM: Array | float = 0.0) -> Normal:
        """Return mean and deviation over all cells of a quantity with these moments per cell."""
        mean = float((self.probability_AM * values_AM).sum())
        spread = self.probability_AM * ((values_AM - mean) ** 2 + variances_AM)
        return Normal(mean, float(np.sqrt(spread.sum())))

    def gain(self) -> Normal:
        """Return the gain of the reference decay as a share of ``scale``."""
        return self.moments(self.coefficients_AM3[..., 2], self.covariance_AM33[..., 2, 2])

    def log_alpha(self) -> Normal:
        """Return the distribution of the log exponent."""
        return self.moments(np.broadcast_to(np.log(ALPHAS)[:, None], self.probability_AM.shape))

    def log_memory(self) -> Normal:
        """Return the distribution of the log memory."""
        return self.moments(np.broadcast_to(np.log(MEMORIES)[None], self.probability_AM.shape))

    def values(self) -> dict[str, float]:
        """Return the law's parameters in the most probable cell, as in ``laws/forms/tissue.py``."""
        a, m = np.unravel_index(int(self.probability_AM.argmax()), self.probability_AM.shape)
        level, progress, gain = (self.scale * float(x) for x in self.coefficients_AM3[a, m])
        return {
            "L0": level,
            "A": progress * self.s1 ** float(ALPHAS[a]),
            "C": gain / float(self.reference_M[m]),
            "alpha": float(ALPHAS[a]),
            "memory": float(MEMORIES[m]),
        }


def posterior(rows: Rows, prior: Prior, s1: float, reference_M: Array) -> Posterior:
    """Return the posterior of L(s) = L0 + A·S1^−alpha − C·S2 given averaged rows.

    In each cell of a grid over (alpha, memory) the three coefficients are a linear Gaussian
    problem, solved exactly; cells are weighted by their evidence and their prior. Residuals are
    relative; their variance is that of the best cell, multiplied by (1 + ρ)/(1 − ρ) for the
    correlation ρ of neighbouring rows. Rows more than 3 deviations off have smaller weights
    (Huber's weights). ``s1``, ``reference_M``: areas at the end of the target, where A and C are
    converted to shares of the loss.
    """
    n = len(rows.loss_n)
    scale = float(rows.loss_n[-1])
    columns = _Columns(rows, scale, s1, reference_M)
    mean_3 = np.array([prior.level.mean, 1.0 - prior.level.mean, prior.gain.mean])
    sd_3 = np.array([prior.level.sd, 2.0 * prior.level.sd, prior.gain.sd])
    prior_AM = _log_density(np.log(ALPHAS), prior.log_alpha)[:, None]
    prior_AM = prior_AM + _log_density(np.log(MEMORIES), prior.log_memory)[None]
    weights_n, variance, sd, persistence = np.ones(n), 1e-4, 0.0, 0.0
    for _ in range(_ROUNDS):
        gram, right, square = columns.normal_equations(weights_n)
        precision = gram / variance + np.diag(sd_3**-2.0)
        covariance = np.asarray(np.linalg.inv(precision), np.float64)
        coefficients = np.einsum("amij,amj->ami", covariance, right / variance + mean_3 / sd_3**2)
        fitted = np.einsum("ami,amij,amj->am", coefficients, gram, coefficients)
        misfit = square - 2.0 * (coefficients * right).sum(-1) + fitted
        strain = (((coefficients - mean_3) / sd_3) ** 2).sum(-1)
        log_p = -0.5 * (misfit / variance + strain - np.linalg.slogdet(covariance)[1]) + prior_AM
        best = np.unravel_index(int(log_p.argmax()), log_p.shape)
        residual_n = columns.residuals(best, coefficients[best])
        size_n = np.abs(residual_n)  # Huber's weights, by a deviation that is robust to outliers
        deviation = 1.4826 * float(np.median(size_n))
        weights_n = np.minimum(1.0, _OUTLIER * deviation / np.maximum(size_n, 1e-300))
        weighted_n = residual_n * np.sqrt(weights_n)
        sd = float(np.sqrt((weighted_n**2).sum() / max(n - 5, 1)))
        persistence = _persistence(weighted_n, rows.starts)
        variance = max(sd, 1e-9) ** 2 * (1.0 + persistence) / (1.0 - persistence)
    p_AM = np.exp(log_p - log_p.max())
    return Posterior(
        scale=scale,
        s1=s1,
        reference_M=reference_M,
        probability_AM=p_AM / p_AM.sum(),
        coefficients_AM3=coefficients,
        covariance_AM33=covariance,
        sd=sd,
        persistence=persistence,
        effective_rows=n * (1.0 - persistence) / (1.0 + persistence),
        weights_n=weights_n,
    )


class _Columns:
    """Regressors of all cells over the loss: 1, s1^−alpha (A of them), −S2 (M of them)."""

    def __init__(self, rows: Rows, scale: float, s1: float, reference_M: Array) -> None:
        self._one_n = scale / rows.loss_n
        self._power_An = self._one_n * (rows.s1_n / s1) ** -ALPHAS[:, None]
        self._fall_Mn = -self._one_n * rows.s2_Mn / reference_M[:, None]

    def normal_equations(self, weights_n: Array) -> tuple[Array, Array, float]:
        """Return XᵀX [A, M, 3, 3], Xᵀ1 [A, M, 3] and 1ᵀ1, weighted."""
        shape = (len(self._power_An), len(self._fall_Mn))
        gram, right = np.empty((*shape, 3, 3)), np.empty((*shape, 3))
        one, power, fall = self._one_n, self._power_An, self._fall_Mn
        gram[..., 0, 0] = (weights_n * one) @ one
        gram[..., 0, 1] = gram[..., 1, 0] = (power @ (weights_n * one))[:, None]
        gram[..., 1, 1] = (power**2 @ weights_n)[:, None]
        gram[..., 0, 2] = gram[..., 2, 0] = (fall @ (weights_n * one))[None]
        gram[..., 2, 2] = (fall**2 @ weights_n)[None]
        gram[..., 1, 2] = gram[..., 2, 1] = (power * weights_n) @ fall.T
        right[..., 0] = weights_n @ one
        right[..., 1] = (power @ weights_n)[:, None]
        right[..., 2] = (fall @ weights_n)[None]
        return gram, right, float(weights_n.sum())

    def residuals(self, cell: tuple[np.intp, ...], coefficients_3: Array) -> Array:
        """Return measured minus fitted over measured [n] in a cell."""
        a, m = cell
        level, progress, gain = coefficients_3
        fitted_n = level * self._one_n + progress * self._power_An[a] + gain * self._fall_Mn[m]
        return np.asarray(1.0 - fitted_n)


def _log_density(x: Array, belief: Normal) -> Array:
    return np.asarray(-0.5 * ((x - belief.mean) / belief.sd) ** 2)


def _persistence(residual_n: Array, starts: tuple[int, ...]) -> float:
    """Return the correlation of neighbouring residuals of the same curve, at least 0.

    Fitting lowers the correlation by 1/n per parameter, which is added.
    """
    products = residual_n[1:] * residual_n[:-1]
    inside = np.ones(len(products), bool)
    inside[[start - 1 for start in starts if start > 0]] = False
    correlation = products[inside].sum() / max(float((residual_n**2).sum()), 1e-300)
    return float(np.clip(correlation + 3.0 / len(residual_n), 0.0, _MOST_PERSISTENCE))
