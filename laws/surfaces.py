"""Best learning rate and batch size of one sweep, by a polynomial through runs near the optimum."""

# n rows of a sweep, K coefficients of a polynomial, A axes that vary, S bootstrap samples

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.observations import Observations

Array = NDArray[np.float64]
Rows = NDArray[np.bool_]

AXES = ("lr", "B")
AXIS_NAMES = {"lr": "learning rates", "B": "batches"}
ROUNDS = 30
"""Maximum number of reweightings of the runs near the optimum."""
SETTLED = 1e-3
"""Change of the optimum, in octaves, below which the reweighting has converged."""
NEWTON_STEPS = 20
OUTLIER = 3.0
"""Excess over the optimum, in units of ``within``, above which a run is left out.

Such runs have a loss spike or diverged.
"""


@dataclass(frozen=True, slots=True)
class Surface:
    """Optimum of one sweep; ``best``: lr and B (the single value of an axis that did not vary).

    ``loss``: at the optimum. ``curvature``: rise of the loss, in nats per token, one octave away
    from the optimum along each axis. ``rows``: number of fitted runs; ``rms``: residual of the
    polynomial. ``best_SA``: log2 of the optima of bootstrap samples, NaN if a sample has none, and
    clipped to the range of the runs. ``problem``: the reason for a missing optimum; ``best`` and
    ``loss`` are then the best run's.
    """

    best: Mapping[str, float]
    loss: float
    curvature: Mapping[str, float]
    axes: tuple[str, ...]
    rows: int
    rms: float
    best_SA: Array
    problem: str | None = None

    def interval(self, axis: str, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval of the best lr or B; NaN for an axis that did not vary."""
        if axis not in self.axes:
            return float("nan"), float("nan")
        low, high = percentiles(self.best_SA[:, self.axes.index(axis)], level)
        return 2.0**low, 2.0**high


def fit_surface(
    observations: Observations,
    *,
    order: Literal[2, 3] = 2,
    within: float = 0.015,
    samples: int = 200,
    seed: int = 0,
) -> Surface:
    """Return the optimum of the runs of one N and D: columns ``lr``, ``B`` and ``loss``.

    Least squares of a full parabola in log2 of the axes that vary, of runs near the optimum: the
    weight of a run is 1 at the minimum of the parabola, smaller where the parabola is higher, and 0
    where it is ``within`` (relative) higher. Weights thus depend on the position of runs, in a few
    iterations, and not on their own losses, whose noise would select runs of low loss and flatten
    the parabola (by 30 % at a noise of a quarter of the window). A loss that is not finite is of a
    run that diverged, which is not fitted. Bootstrap samples draw among the runs with positive
    weight.

    Real loss surfaces are steeper towards high rates, so that a parabola's optimum is biased to low
    rates, more so for a wider window (0.2 octaves on Step Law's grid). ``order=3`` fits a full
    cubic to the same runs and returns its minimum near the parabola's: less bias, three times the
    noise; for grids of about 30 runs or more near the optimum. Raises UserError: no axis varies, an
    axis has only two values, or a rate or batch size or ``within`` is not positive.
    """
    axes, loss_n = _check_sweep(observations, within)
    best_row = int(np.argmin(loss_n))
    start = {name: float(observations[name][best_row]) for name in AXES}
    x_nA = np.stack([np.log2(observations[name]) for name in axes], axis=1)
    weight_n = _weigh(x_nA, loss_n, within)
    near_n = weight_n > 0.0

    def failed(problem: str) -> Surface:
        empty_SA, rows = np.full((samples, len(axes)), np.nan), int(near_n.sum())
        return Surface(start, float(loss_n[best_row]), {}, axes, rows, np.nan, empty_SA, problem)

    problem = _unfit(x_nA, near_n, within, order)
    if problem is not None:
        return failed(problem)
    x_nA, y_n, weight_n = x_nA[near_n], loss_n[near_n], weight_n[near_n]
    center_A = x_nA.mean(axis=0)
    n = len(y_n)  # all rows once, then each bootstrap draw
    drawn_Sn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), samples)
    weights_Sn = weight_n * np.vstack([np.ones(n), drawn_Sn])
    optima = _optima(x_nA - center_A, y_n, weights_Sn, order)
    vertex_SA, bowl_S = optima.at_SA, optima.bowl_S
    low_A, high_A = x_nA.min(axis=0) - center_A, x_nA.max(axis=0) - center_A
    problem = _no_optimum(axes, bowl_S, vertex_SA[0], low_A, high_A)
    if problem is not None:
        return failed(problem)
    optimum = dict(zip(axes, (2.0 ** (center_A + vertex_SA[0])).tolist(), strict=True))
    return Surface(
        best={**start, **optimum},
        loss=optima.loss,
        curvature=dict(zip(axes, optima.curvature_A.tolist(), strict=True)),
        axes=axes,
        rows=len(y_n),
        rms=float(np.sqrt(np.average(optima.residual_n**2, weights=weight_n))),
        best_SA=np.where(bowl_S[1:, None], center_A + vertex_SA[1:].clip(low_A, high_A), np.nan),
    )


def _check_sweep(observations: Observations, within: float) -> tuple[tuple[str, ...], Array]:
    """Return the axes that vary, and the losses with infinity for runs that diverged."""
    if not within > 0.0:
        raise UserError(f"within={within} must be positive; 0.015 is usual")
    axes = tuple(name for name in AXES if _varies(observations, name))
    if not axes:
        raise UserError("the sweep has one learning rate and one batch; vary one of them")
    loss_n = np.where(np.isfinite(observations["loss"]), observations["loss"], np.inf)
    if not np.isfinite(loss_n).any():
        raise UserError("every run of the sweep diverged; sweep lower learning rates")
    return axes, loss_n


def _no_optimum(
    axes: tuple[str, ...], bowl_S: NDArray[np.bool_], vertex_A: Array, low_A: Array, high_A: Array
) -> str | None:
    """Return why the fit (sample 0) and its resamples have no optimum among the runs, or None."""
    if not bowl_S[0]:
        return "the losses around the best run are no bowl"
    for name, inside in zip(axes, (low_A <= vertex_A) & (vertex_A <= high_A), strict=True):
        if not inside:
            return f"the optimum lies outside of the {AXIS_NAMES[name]} that were run"
    if len(bowl_S) > 1 and bowl_S[1:].mean() < 0.5:
        return "half the resamples of the runs around the best one are no bowl"
    return None


def percentiles(values_S: Array, level: float) -> tuple[float, float]:
    """Return the interval of the finite values; (NaN, NaN) if half of the values are not finite."""
    kept = values_S[np.isfinite(values_S)]
    if len(kept) <= len(values_S) / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _varies(observations: Observations, name: str) -> bool:
    values = observations[name]
    if not (np.isfinite(values) & (values > 0.0)).all():
        raise UserError(f"{name} must be positive in every row of a sweep; mend or drop the others")
    number = len(np.unique(values))
    if number == 2:
        raise UserError(f"a parabola needs three {AXIS_NAMES[name]} and the sweep has two; add one")
    return number > 2


def _weigh(x_nA: Array, loss_n: Array, within: float) -> Array:
    """Return the weight of each row: first by its loss, then by the parabola's height.

    Each iteration mixes new weights with the previous ones, in decreasing proportion: on a surface
    that is not a parabola the weights would otherwise oscillate between two sets. Stops with the
    current weights if an iteration has no minimum or too few rows.
    """
    weight_n: Array = (loss_n <= loss_n.min() * (1.0 + within)).astype(np.float64)
    before_A = np.full(x_nA.shape[1], np.inf)
    if _unfit(x_nA, weight_n > 0.0, within) is not None:
        return weight_n
    for done in range(ROUNDS):
        near_n = weight_n > 0.0
        center_A = x_nA[near_n].mean(axis=0)
        terms_nK = _terms(x_nA - center_A)
        fitted_SK = _least_squares(terms_nK[near_n], loss_n[near_n], weight_n[None, near_n])
        vertex_SA, bowl_S = _vertices(fitted_SK, x_nA.shape[1])
        if not bowl_S[0] or np.abs(center_A + vertex_SA[0] - before_A).max() < SETTLED:
            break
        before_A = center_A + vertex_SA[0]
        least = float(_terms(vertex_SA)[0] @ fitted_SK[0])
        height_n = np.maximum(terms_nK @ fitted_SK[0] - least, 0.0) / (within * least)
        new_n = np.clip(1.0 - height_n, 0.0, 1.0)
        new_n[loss_n > least * (1.0 + OUTLIER * within)] = 0.0
        share = 2.0 / (2.0 + done)
        mixed_n = share * new_n + (1.0 - share) * weight_n
        mixed_n[mixed_n < 1e-3] = 0.0
        if _unfit(x_nA, mixed_n > 0.0, within) is not None:
            break
        weight_n = np.asarray(mixed_n)
    return weight_n


def _unfit(x_nA: Array, near_n: Rows, within: float, order: int = 2) -> str | None:
    """Return why these rows determine no polynomial, with one row to spare, or None."""
    number, coefficients = int(near_n.sum()), len(_powers(x_nA.shape[1], order))
    shape = "parabola" if order == 2 else "cubic"
    if number < coefficients + 1:
        runs = "1 run is" if number == 1 else f"{number} runs are"
        needed = f"{coefficients + 1} that a {shape} needs"
        return f"only {runs} within {within:.2%} of the best, of {needed}"
    terms_nK = _terms(x_nA[near_n] - x_nA[near_n].mean(axis=0), order)
    if np.linalg.matrix_rank(terms_nK) < coefficients:
        return f"the runs within {within:.2%} of the best do not span a {shape}"
    return None


@cache
def _powers(axes: int, order: int) -> NDArray[np.int64]:
    """Return exponents of every monomial of at most this degree [K, A], lower degrees first."""
    every = [p for p in product(range(order + 1), repeat=axes) if sum(p) <= order]
    return np.array(sorted(every, key=sum))


def _terms(x_nA: Array, order: int = 2) -> Array:
    """Return every monomial of at most this degree [n, K]."""
    return np.asarray(np.prod(x_nA[:, None, :] ** _powers(x_nA.shape[1], order), axis=2))


def _derivative(coefficients_SK: Array, at_SA: Array, order: int, by: tuple[int, ...]) -> Array:
    """Return the polynomials' derivative [S] by these axes in turn, each at its point."""
    powers_KA = _powers(at_SA.shape[1], order).copy()
    factor_K = np.ones(len(powers_KA))
    for axis in by:
        factor_K = factor_K * powers_KA[:, axis]
        powers_KA[:, axis] = np.maximum(powers_KA[:, axis] - 1, 0)
    monomials_SK = np.prod(at_SA[:, None, :] ** powers_KA, axis=2)
    return np.asarray((coefficients_SK * factor_K * monomials_SK).sum(axis=1))


def _least_squares(terms_nK: Array, y_n: Array, weights_Sn: Array) -> Array:
    """Return weighted least squares for each row of weights, [S, K]; NaN for singular problems."""
    # QR first: normal equations of orthonormal columns do not lose precision.
    basis_nK, upper_KK = np.linalg.qr(terms_nK)
    products_nKK = basis_nK[:, :, None] * basis_nK[:, None, :]
    gram_SKK = np.tensordot(weights_Sn, products_nKK, axes=1)
    right_SK = (weights_Sn * y_n) @ basis_nK
    spans_S = np.linalg.cond(gram_SKK) < 1e10
    gram_SKK[~spans_S] = np.eye(gram_SKK.shape[-1])
    solved_SK = np.linalg.solve(gram_SKK, right_SK[..., None])[..., 0]
    solved_SK[~spans_S] = np.nan
    return np.asarray(np.linalg.solve(upper_KK, solved_SK.T).T)


def _newton(coefficients_SK: Array, at_SA: Array, order: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return a Newton step from each point [S, A], and a mask of points with convex surface [S]."""
    axes = range(at_SA.shape[1])
    slope_SA = np.stack([_derivative(coefficients_SK, at_SA, order, (i,)) for i in axes], axis=1)
    hessian_SA = [_derivative(coefficients_SK, at_SA, order, (i, j)) for i in axes for j in axes]
    hessian_SAA = np.stack(hessian_SA, axis=1).reshape(-1, len(axes), len(axes))
    known_S = np.isfinite(slope_SA).all(axis=1) & np.isfinite(hessian_SAA).all(axis=(1, 2))
    hessian_SAA[~known_S] = -np.eye(len(axes))
    bowl_S = np.linalg.eigvalsh(hessian_SAA)[:, 0] > 0.0
    hessian_SAA[~bowl_S] = np.eye(len(axes))
    step_SA = np.linalg.solve(hessian_SAA, slope_SA[..., None])[..., 0]
    return np.where(bowl_S[:, None], at_SA - step_SA, np.nan), bowl_S


def _vertices(coefficients_SK: Array, axes: int) -> tuple[Array, NDArray[np.bool_]]:
    """Return the stationary point of each parabola [S, A], and a mask of minima [S]."""
    return _newton(coefficients_SK, np.zeros((len(coefficients_SK), axes)), 2)


@dataclass(frozen=True, slots=True)
class _Optima:
    """Optima [S, A] by each row of weights, with loss, curvature and residuals of the first."""

    at_SA: Array
    bowl_S: NDArray[np.bool_]
    loss: float
    curvature_A: Array
    residual_n: Array


def _optima(x_nA: Array, y_n: Array, weights_Sn: Array, order: int) -> _Optima:
    """Minimize the polynomials of these weights: a cubic by Newton steps from the parabola."""
    axes = x_nA.shape[1]
    terms_nK = _terms(x_nA)
    fitted_SK = _least_squares(terms_nK, y_n, weights_Sn)
    at_SA, bowl_S = _vertices(fitted_SK, axes)
    if order == 3:
        terms_nK = _terms(x_nA, order)
        fitted_SK = _least_squares(terms_nK, y_n, weights_Sn)
        for _ in range(NEWTON_STEPS):
            new_SA, convex_S = _newton(fitted_SK, at_SA, order)
            # A cubic falls without limit on one side: steps are limited to half an octave.
            step_SA = np.clip(new_SA - at_SA, -0.5, 0.5)
            at_SA, bowl_S = at_SA + step_SA, bowl_S & convex_S
        bowl_S &= np.nan_to_num(np.abs(step_SA), nan=1.0).max(axis=1) < SETTLED
    curvature = [_derivative(fitted_SK[:1], at_SA[:1], order, (i, i))[0] / 2 for i in range(axes)]
    return _Optima(
        at_SA=at_SA,
        bowl_S=bowl_S,
        loss=float(_derivative(fitted_SK[:1], at_SA[:1], order, ())[0]),
        curvature_A=np.array(curvature),
        residual_n=terms_nK @ fitted_SK[0] - y_n,
    )
