"""Starts of searches: a grid, or evenly spread points; never chosen near published values."""

# S starts, n rows, P free parameters, K of them linear

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.problem import CHUNK, Problem, search_coordinate

Array = NDArray[np.float64]

SPREAD = 256


def starts_of(problem: Problem, number: int | None, seed: int) -> Array:
    """Return the starts [S, P] in search coordinates.

    ``number`` None: the grid of the form if all its free parameters have one, else 256 spread
    points. A number requests this many spread points.
    """
    if number is None and all(p.grid is not None for p in problem.free):
        axes = [[search_coordinate(p, value) for value in p.grid or ()] for p in problem.free]
        return np.array(list(itertools.product(*axes)))
    low_P = np.array([search_coordinate(p, p.start[0]) for p in problem.free])
    high_P = np.array([search_coordinate(p, p.start[1]) for p in problem.free])
    points_SP = spread_points(SPREAD if number is None else number, len(problem.free), seed)
    return np.asarray(low_P + points_SP * (high_P - low_P))


def spread_points(number: int, dimensions: int, seed: int) -> Array:
    """Return evenly spread points [number, dimensions] of the unit cube.

    Roberts' additive recurrence (R_d, "The unreasonable effectiveness of quasirandom sequences",
    2018): point k is the fraction of shift + k/φ^j, φ the root of φ^(d+1) = φ + 1. Any prefix is
    evenly spread as well; ``seed`` draws the shift.
    """
    phi = 2.0
    for _ in range(60):
        phi = (1.0 + phi) ** (1.0 / (dimensions + 1))
    step_P = phi ** -np.arange(1.0, dimensions + 1)
    shift_P = np.random.default_rng(seed).random(dimensions)
    return np.asarray((shift_P + np.arange(1, number + 1)[:, None] * step_P) % 1.0)


def project(problem: Problem, x_SP: Array) -> Array:
    """Return the starts with optimal linear parameters (variable projection).

    Given the others, the linear parameters minimize the squared residuals, relative ones for
    residuals of logs: Golub & Pereyra 1973; arXiv 2603.22339 for laws of this kind. The solution is
    used if it is inside of the bounds and gives finite residuals; otherwise a start keeps its own
    values. The search then moves all parameters together, so its optimum is that of the joint
    problem.
    """
    linear = [index for index, parameter in enumerate(problem.free) if parameter.linear]
    if not linear:
        return x_SP
    # Starts that differ only in linear parameters have the same solution: solve once.
    others = [index for index in range(x_SP.shape[1]) if index not in linear]
    _, first, back = np.unique(x_SP[:, others], axis=0, return_index=True, return_inverse=True)
    rows = max(1, CHUNK // len(problem.target_n))
    parts = [first[start : start + rows] for start in range(0, len(first), rows)]
    solved_SP = np.concatenate([_solve_linear(problem, x_SP[part], linear) for part in parts])
    projected_SP = solved_SP[back.reshape(-1)]
    usable_S = np.isfinite(projected_SP).all(axis=1)
    return np.where(usable_S[:, None], projected_SP, x_SP)


def _solve_linear(problem: Problem, x_SP: Array, linear: list[int]) -> Array:
    """Return x [S, P] with least-squares linear parameters; NaN where they cannot be used."""
    shape = (len(x_SP), len(problem.target_n))
    weight_n = np.exp(-problem.target_n) if problem.logs else np.ones(shape[1])
    target_n = np.ones(shape[1]) if problem.logs else problem.target_n
    solved_SP = x_SP.copy()
    with np.errstate(all="ignore"):
        none = {**problem.values(x_SP), **{problem.free[i].name: 0.0 for i in linear}}

        def predicted(name: str | None) -> Array:
            values = none if name is None else {**none, name: 1.0}
            return np.broadcast_to(problem.form.predict(values, problem.prepared), shape)

        rest_Sn = predicted(None)
        design_SnK = np.stack([predicted(problem.free[i].name) - rest_Sn for i in linear], axis=2)
        design_SnK = design_SnK * weight_n[:, None]
        size_SK = np.sqrt((design_SnK**2).sum(axis=1))
        goal_Sn = target_n - rest_Sn * weight_n
    problems = zip(design_SnK, size_SK, goal_Sn, strict=True)
    for row, (design_nK, size_K, goal_n) in enumerate(problems):
        if not ((np.isfinite(size_K) & (size_K > 0.0)).all() and np.isfinite(goal_n).all()):
            solved_SP[row] = np.nan
            continue
        values_K = np.linalg.lstsq(design_nK / size_K, goal_n, rcond=1e-10)[0] / size_K
        for index, value in zip(linear, values_K, strict=True):
            parameter = problem.free[index]
            inside = parameter.low <= value <= parameter.high
            inside = inside and (value > 0.0 or parameter.scale == "linear")
            solved_SP[row, index] = search_coordinate(parameter, value) if inside else np.nan
    bad_S = ~np.isfinite(problem.residuals(np.nan_to_num(solved_SP))).all(axis=1)
    solved_SP[bad_S] = np.nan
    return solved_SP
