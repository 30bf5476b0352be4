"""Batched Levenberg-Marquardt on Huber losses, over many starts and weights."""

# S searches, n rows, P free parameters

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.problem import CHUNK, Problem

Array = NDArray[np.float64]

EASE, TIGHTEN = 0.25, 10.0
LEAST_DAMPING, MOST_DAMPING = 1e-9, 1e12
HALVING = 10
"""Iterations between two halvings of the remaining searches."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Huber's loss with ½r² inside of ``delta`` (None: ½r² everywhere), summed over rows.

    With this convention the optimum on the 240 points of Besiroglu et al. (arXiv 2404.10102) is
    their 0.00101827.
    """

    delta: float | None

    def value(self, r: Array) -> Array:
        """Return the loss of each residual."""
        if self.delta is None:
            return 0.5 * r * r
        size = np.abs(r)
        clipped = np.minimum(size, self.delta)
        return np.asarray(clipped * (size - 0.5 * clipped))


@dataclass(frozen=True, slots=True)
class Solved:
    """Ends of searches: x [S, P], objectives [S] (infinite if never finite), slopes.

    ``gradient_SP`` by search coordinate, 0 where a bound stops the descent. ``decrease_S``: gain of
    one more step, by the quadratic model. ``finished_S``: False if dropped by halving.
    """

    x_SP: Array
    objective_S: Array
    gradient_SP: Array
    decrease_S: Array
    iterations_S: NDArray[np.int64]
    finished_S: NDArray[np.bool_]


def minimize(
    problem: Problem,
    starts_SP: Array,
    loss: Loss,
    weights_Sn: Array | None = None,
    *,
    survivors: int | None = None,
    max_iterations: int = 300,
    tolerance: float = 1e-12,
) -> Solved:
    """Return the local optima of Σ_n w_n loss(residual_n) that searches from these starts reach.

    Each search is a projected Levenberg-Marquardt. Its curvature is JᵀVJ with V = 1 on rows inside
    of δ plus κ·min(1, δ/|r|) on all rows: for κ = 1 this majorizes the loss of the linearized
    residuals (far from an optimum a step is one of reweighted least squares), and for κ -> 0 it is
    the curvature of the loss itself (near an optimum a step is a Newton step). κ and the damping of
    the diagonal shrink while steps succeed. A search ends when one more step would gain less than
    ``tolerance`` of its objective or when no step gains anything; ended searches have no cost.

    ``survivors``: successive halving, for many starts of one problem. After each ten iterations the
    half of the searches with the larger objectives is dropped, down to ``survivors`` (None: no).
    """
    # glibc returns a freed block to the system unless a block at least as large was freed before. A
    # search frees blocks of a few hundred KiB all the time, and page faults for new blocks took two
    # thirds of its time. This block of 16 MiB is never used. Other C libraries ignore it.
    np.empty(2**21)
    number = len(starts_SP)
    x_SP = np.clip(starts_SP, problem.low_P, problem.high_P)
    damping_S = np.ones(number)
    f_S, g_SP, H_SPP = _evaluate(problem, x_SP, loss, weights_Sn, np.ones(number))
    iterations_S = np.zeros(number, np.int64)
    decrease_S = np.full(number, np.inf)
    active_S, finished_S = np.isfinite(f_S), np.isfinite(f_S)
    for iteration in range(max_iterations):
        if survivors is not None and iteration and iteration % HALVING == 0:
            going = np.flatnonzero(finished_S)
            keep = max(survivors, len(going) // 2)
            finished_S[going[np.argsort(f_S[going], kind="stable")[keep:]]] = False
            active_S &= finished_S
        rows = np.flatnonzero(active_S)
        if not len(rows):
            break
        iterations_S[rows] += 1
        x, g, damping = x_SP[rows], g_SP[rows], damping_S[rows]
        step, gain = _step(problem, x, g, H_SPP[rows], damping)
        trial = np.clip(x + step, problem.low_P, problem.high_P)
        weights = None if weights_Sn is None else weights_Sn[rows]
        eased = np.maximum(damping * EASE, LEAST_DAMPING)
        f, new_g, new_H = _evaluate(problem, trial, loss, weights, np.minimum(eased, 1.0))
        won = f < f_S[rows]
        small = gain <= tolerance * f_S[rows]
        kept = rows[won]
        x_SP[kept], f_S[kept], g_SP[kept], H_SPP[kept] = trial[won], f[won], new_g[won], new_H[won]
        decrease_S[rows] = gain
        damping_S[rows] = np.where(won, eased, damping * TIGHTEN)
        ended = (small & (damping < 1.0)) | (damping_S[rows] > MOST_DAMPING) | (f_S[rows] == 0.0)
        active_S[rows[ended]] = False
    g_SP = np.where(_blocked(problem, x_SP, g_SP), 0.0, g_SP)
    return Solved(x_SP, f_S, g_SP, decrease_S, iterations_S, finished_S)


def _blocked(problem: Problem, x_SP: Array, g_SP: Array) -> NDArray[np.bool_]:
    """Return a mask of parameters at a bound beyond which the objective falls."""
    return ((x_SP <= problem.low_P) & (g_SP > 0.0)) | ((x_SP >= problem.high_P) & (g_SP < 0.0))


def _step(
    problem: Problem, x_SP: Array, g_SP: Array, H_SPP: Array, damping_S: Array
) -> tuple[Array, Array]:
    """Return the damped steps [S, P] and their gains [S] by the quadratic model."""
    free_SP = ~_blocked(problem, x_SP, g_SP)
    g_SP = np.where(free_SP, g_SP, 0.0)
    diagonal_SP = np.einsum("spp->sp", H_SPP)
    largest_S1 = diagonal_SP.max(axis=1, keepdims=True)
    scale_SP = np.sqrt(np.maximum(diagonal_SP, np.maximum(1e-14 * largest_S1, 1e-300)))
    scaled = H_SPP / scale_SP[:, :, None] / scale_SP[:, None, :]
    scaled *= free_SP[:, :, None] & free_SP[:, None, :]
    index = np.arange(x_SP.shape[1])
    scaled[:, index, index] = np.where(free_SP, scaled[:, index, index], 1.0)
    scaled[:, index, index] += damping_S[:, None]
    step_SP = -np.linalg.solve(scaled, (g_SP / scale_SP)[:, :, None])[:, :, 0] / scale_SP
    gain_S = -0.5 * (g_SP * step_SP).sum(axis=1)
    return step_SP, gain_S


def _evaluate(
    problem: Problem, x_SP: Array, loss: Loss, weights_Sn: Array | None, kappa_S: Array
) -> tuple[Array, Array, Array]:
    """Return objectives [S], gradients [S, P] and curvatures [S, P, P], chunk by chunk."""
    number, width = x_SP.shape
    f_S = np.empty(number)
    g_SP = np.empty((number, width))
    H_SPP = np.empty((number, width, width))
    rows = max(1, CHUNK // len(problem.target_n))
    for start in range(0, number, rows):
        part = slice(start, start + rows)
        weights = None if weights_Sn is None else weights_Sn[part]
        with np.errstate(all="ignore"):
            f_S[part], g_SP[part], H_SPP[part] = _evaluate_chunk(
                problem, x_SP[part], loss, weights, kappa_S[part]
            )
    return f_S, g_SP, H_SPP


def _evaluate_chunk(
    problem: Problem, x_SP: Array, loss: Loss, weights_Sn: Array | None, kappa_S: Array
) -> tuple[Array, Array, Array]:
    """Return objectives, gradients and curvatures: infinite and 0 where a residual is undefined.

    Derivatives are computed by value and of predictions; the factors for residuals and search
    coordinates are applied to the rows' weights and to rows and columns of the small matrices.
    """
    predicted_Sn, J_SPn, stretch_SP = problem.raw_slopes(x_SP)
    r_Sn = problem.residual(predicted_Sn)
    losses_Sn, slope_Sn, curvature_Sn = _weigh(r_Sn, loss, kappa_S)
    if weights_Sn is not None:
        losses_Sn *= weights_Sn
        slope_Sn *= weights_Sn
        curvature_Sn *= weights_Sn
    f_S = losses_Sn.sum(axis=1)
    if problem.logs:
        inverse_Sn = 1.0 / predicted_Sn
        slope_Sn *= inverse_Sn
        curvature_Sn *= inverse_Sn
        curvature_Sn *= inverse_Sn
    number, width, rows = J_SPn.shape
    right_SQn = np.empty((number, width + 1, rows))
    np.multiply(J_SPn, curvature_Sn[:, None, :], out=right_SQn[:, :width])
    right_SQn[:, width] = slope_Sn
    both_SPQ = np.matmul(J_SPn, right_SQn.transpose(0, 2, 1))
    both_SPQ *= stretch_SP[:, :, None]
    g_SP = both_SPQ[:, :, width]
    H_SPP = both_SPQ[:, :, :width] * stretch_SP[:, None, :]
    good_S = np.isfinite(f_S + both_SPQ.sum(axis=(1, 2)) + H_SPP.sum(axis=(1, 2)))
    if not good_S.all():
        f_S = np.where(good_S, f_S, np.inf)
        g_SP = np.where(good_S[:, None], g_SP, 0.0)
        H_SPP = np.where(good_S[:, None, None], H_SPP, 0.0)
    return f_S, g_SP, H_SPP


def _weigh(r_Sn: Array, loss: Loss, kappa_S: Array) -> tuple[Array, Array, Array]:
    """Return each residual's loss, its derivative, and the curvature of the step [S, n]."""
    if loss.delta is None:
        return 0.5 * r_Sn * r_Sn, r_Sn, np.ones_like(r_Sn) * (1.0 + kappa_S[:, None])
    size_Sn = np.abs(r_Sn)
    share_Sn = loss.delta / np.maximum(size_Sn, loss.delta)
    clipped_Sn = np.minimum(size_Sn, loss.delta)
    slope_Sn = r_Sn * share_Sn
    curvature_Sn = kappa_S[:, None] * share_Sn
    curvature_Sn += size_Sn <= loss.delta
    size_Sn -= 0.5 * clipped_Sn
    size_Sn *= clipped_Sn
    return size_Sn, slope_Sn, curvature_Sn
