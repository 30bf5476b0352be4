"""Refits of one problem with other weights of its rows, from a nearby optimum."""

# B sets of weights, n rows, P free parameters, S searches, K starts of one set

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.problem import Problem
from allometry.laws.fit.solver import Loss, minimize

Array = NDArray[np.float64]


def refit(
    problem: Problem, loss: Loss, center_P: Array, weights_Bn: Array, perturbed: int, seed: int
) -> Array:
    """Return the optima [B, P], in search coordinates, for each row of weights; NaN if none found.

    Searches start at ``center_P`` and at ``perturbed`` points around it, from the normal
    distribution of the optimum for squared residuals (limited to 1 per coordinate).
    """
    number = len(weights_Bn)
    draw = np.random.default_rng(seed)
    starts_KP = np.concatenate([center_P[None], around(problem, center_P, perturbed, draw)])
    starts_SP = np.tile(starts_KP, (number, 1))
    weights_Sn = np.repeat(weights_Bn, len(starts_KP), axis=0)
    solved = minimize(problem, starts_SP, loss, weights_Sn)
    objective_BK = solved.objective_S.reshape(number, len(starts_KP))
    x_BKP = solved.x_SP.reshape(number, len(starts_KP), -1)
    x_BP = x_BKP[np.arange(number), np.argmin(objective_BK, axis=1)]
    return np.where(np.isfinite(objective_BK.min(axis=1))[:, None], x_BP, np.nan)


def around(problem: Problem, x_P: Array, number: int, draw: np.random.Generator) -> Array:
    """Return points [number, P] around an optimum, spread by the uncertainty from its residuals."""
    r_Sn, J_SPn = problem.slopes(x_P[None])
    left, singular, _ = np.linalg.svd(J_SPn[0], full_matrices=False)
    freedom = max(r_Sn.shape[1] - len(x_P), 1)
    noise = float(np.sqrt((r_Sn**2).sum() / freedom))
    reach = np.minimum(noise / np.maximum(singular, 1e-300), 1.0)
    steps_KP = (draw.standard_normal((number, len(reach))) * reach) @ left.T
    return np.asarray(np.clip(x_P + np.clip(steps_KP, -1.0, 1.0), problem.low_P, problem.high_P))
