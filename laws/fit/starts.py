"""Where searches start: a grid, or points spread evenly; never near published values."""

# S starts, n rows, P free parameters, K linear ones of them

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.problem import Problem, search_coordinate

Array = NDArray[np.float64]

SPREAD = 256


def starts_of(problem: Problem, number: int | None, seed: int) -> Array:
    """Return the starts [S, P] in search coordinates.

    ``number`` None: the grid of the form if all its free parameters have one, else 256 spread
    points. A number asks for so many spread points.
    """
    grids = [parameter.grid for parameter in problem.free]
    if number is None and all(grid is not None for grid in grids):
        axes = [
            [search_coordinate(parameter, value) for value in grid or ()]
            for parameter, grid in zip(problem.free, grids, strict=True)
        ]
        return np.array(list(itertools.product(*axes)))
    low_P = np.array([search_coordinate(p, p.start[0]) for p in problem.free])
    high_P = np.array([search_coordinate(p, p.start[1]) for p in problem.free])
    points_SP = spread_points(SPREAD if number is None else number, len(problem.free), seed)
    return np.asarray(low_P + points_SP * (high_P - low_P))


def spread_points(number: int, dimensions: int, seed: int) -> Array:
    """Return points [number, dimensions] of the unit cube, evenly spread.

    Roberts' additive recurrence (R_d, "The unreasonable effectiveness of quasirandom sequences",
    2018): point k is the fraction of shift + k/φ^j, φ the root of φ^(d+1) = φ + 1. Any prefix is
    even too; ``seed`` draws the shift.
    """
    phi = 2.0
    for _ in range(60):
        phi = (1.0 + phi) ** (1.0 / (dimensions + 1))
    step_P = phi ** -np.arange(1.0, dimensions + 1)
    shift_P = np.random.default_rng(seed).random(dimensions)
    points: Array = (shift_P + np.arange(1, number + 1)[:, None] * step_P) % 1.0
    return points


def project(problem: Problem, x_SP: Array) -> Array:
    """Return the starts with their linear parameters solved for (variable projection).

    Given the others, the linear parameters minimise the squared residuals, relative ones where
    logs are compared: Golub & Pereyra 1973; arXiv 2603.22339 for laws of this kind. The solution
    is taken where it lies inside of the bounds and predicts what can be compared; elsewhere a
    start keeps its own. From there the search moves all parameters together, so its optimum is
    that of the joint problem.
    """
    linear = [index for index, parameter in enumerate(problem.free) if parameter.linear]
    if not linear:
        return x_SP
    # Starts that differ in linear parameters only have the same solution: solve once.
    others = [index for index in range(x_SP.shape[1]) if index not in linear]
    _, first, back = np.unique(x_SP[:, others], axis=0, return_index=True, return_inverse=True)
    solved_SP = np.concatenate(
        [_solve_linear(problem, part, linear) for part in np.array_split(x_SP[first], len(first))]
    )
    projected_SP = solved_SP[back.reshape(-1)]
    usable_S = np.isfinite(projected_SP).all(axis=1)
    return np.where(usable_S[:, None], projected_SP, x_SP)


def _solve_linear(problem: Problem, x_SP: Array, linear: list[int]) -> Array:
    """Return x [S, P] with least-squares linear parameters; NaN where they are out of bounds."""
    weight_n = np.exp(-problem.target_n) if problem.logs else np.ones_like(problem.target_n)
    target_n = np.ones_like(weight_n) if problem.logs else problem.target_n
    solved_SP = x_SP.copy()
    with np.errstate(all="ignore"):
        for row_P in solved_SP:
            values = {
                name: value[0, 0] if np.ndim(value) else value
                for name, value in problem.values(row_P[None]).items()
            }
            names = [problem.free[index].name for index in linear]
            none = {**values, **dict.fromkeys(names, 0.0)}
            rest_n = np.broadcast_to(problem.form.predict(none, problem.prepared), target_n.shape)
            design_nK = np.stack(
                [
                    problem.form.predict({**none, name: 1.0}, problem.prepared) - rest_n
                    for name in names
                ],
                axis=1,
            )
            design_nK = design_nK * weight_n[:, None]
            size_K = np.sqrt((design_nK**2).sum(axis=0))
            if not (np.isfinite(design_nK).all() and (size_K > 0.0).all()):
                row_P[linear] = np.nan
                continue
            scaled_K = np.linalg.lstsq(
                design_nK / size_K, target_n - rest_n * weight_n, rcond=1e-10
            )[0]
            for index, value in zip(linear, scaled_K / size_K, strict=True):
                parameter = problem.free[index]
                inside = parameter.low <= value <= parameter.high
                if parameter.scale == "log":
                    inside = inside and value > 0.0
                row_P[index] = search_coordinate(parameter, value) if inside else np.nan
    bad_S = ~np.isfinite(problem.residuals(np.nan_to_num(solved_SP))).all(axis=1)
    solved_SP[bad_S] = np.nan
    return solved_SP
