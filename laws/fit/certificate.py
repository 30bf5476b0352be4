"""Certificate of a fit: agreement of starts, and identifiability of the parameters."""

# S starts, n rows, P free parameters

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.plain import plain_number
from allometry.laws.fit.problem import Problem, search_coordinate
from allometry.laws.fit.solver import Solved
from allometry.laws.forms.base import Parameter

Array = NDArray[np.float64]

AGREEMENT = 1e-6
"""Relative distance from the best objective within which starts agree."""
ROUNDING = 1e-24
"""Objective per row below which a fit is exact, and starts differ only by rounding."""
NULL = 1e-7
"""Relative size of singular values whose directions the data do not determine."""
NUMBERS = ("gradient_norm", "decrease", "spread", "condition")
SHARE = 0.1
"""Minimum component of a parameter in such a direction for the parameter to be listed."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """Certainty of an optimum.

    ``gradient_norm``: of the summed objective, by search coordinates (logs of parameters of log
    scale), 0 where a bound stops the descent. ``decrease``: gain of one more step, relative to the
    objective. ``starts``: number of starts; ``finished``: starts searched to the end (not dropped
    by successive halving); ``agreeing``: finished starts within 1e-6 of the best objective;
    ``spread``: largest difference of a search coordinate among these. ``at_bounds``: parameters on
    a bound. ``condition``: condition number of the Gauss-Newton matrix JᵀJ with columns of length 1
    (infinite if singular). ``unidentified``: parameters that can change, alone or together, without
    changing a prediction. ``standard_errors``: of search coordinates, from JᵀJ and the residuals'
    median size, for independent rows. ``loose``: parameters with an interval of two standard errors
    to each side that is wider than the range of the starts.
    """

    gradient_norm: float
    decrease: float
    starts: int
    finished: int
    agreeing: int
    spread: float
    at_bounds: tuple[str, ...]
    condition: float
    unidentified: tuple[str, ...]
    standard_errors: dict[str, float]
    loose: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for ``from_json``."""
        errors = {name: plain_number(value) for name, value in self.standard_errors.items()}
        numbers = {name: plain_number(getattr(self, name)) for name in NUMBERS}
        return {**asdict(self), **numbers, "standard_errors": errors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the certificate of ``to_json``."""
        errors = {name: float(value) for name, value in data["standard_errors"].items()}
        numbers = {name: float(data[name]) for name in NUMBERS}
        names = {name: tuple(data[name]) for name in ("at_bounds", "unidentified", "loose")}
        return cls(**{**data, **numbers, **names, "standard_errors": errors})


def certify(problem: Problem, solved: Solved, counts_S: NDArray[np.int64]) -> Certificate:
    """Return the certificate of the best search; ``counts_S``: number of starts of each search."""
    best = int(np.argmin(solved.objective_S))
    objective = float(solved.objective_S[best])
    x_P = solved.x_SP[best]
    agree_S = solved.finished_S & (
        solved.objective_S <= objective * (1.0 + AGREEMENT) + ROUNDING * len(problem.target_n)
    )
    at_bounds = (x_P <= problem.low_P) | (x_P >= problem.high_P)
    condition, unidentified, errors_P = identifiability(problem, x_P)
    errors = list(zip(problem.free, errors_P.tolist(), strict=True))
    gain = float(solved.decrease_S[best])
    return Certificate(
        gradient_norm=float(np.linalg.norm(solved.gradient_SP[best])),
        decrease=gain / objective if objective > 0.0 else 0.0,
        starts=int(counts_S.sum()),
        finished=int(counts_S[solved.finished_S].sum()),
        agreeing=int(counts_S[agree_S].sum()),
        spread=float(np.ptp(solved.x_SP[agree_S], axis=0).max(initial=0.0)),
        at_bounds=tuple(p.name for p, at in zip(problem.free, at_bounds, strict=True) if at),
        condition=condition,
        unidentified=unidentified,
        standard_errors={p.name: error for p, error in errors},
        loose=tuple(
            p.name
            for p, error in errors
            if p.name not in unidentified and 4.0 * error > start_width(p)
        ),
    )


def start_width(parameter: Parameter) -> float:
    """Return the width of the range of starts of a parameter, in its search coordinate."""
    low, high = (search_coordinate(parameter, value) for value in parameter.start)
    return high - low if high > low else float("inf")


def identifiability(problem: Problem, x_P: Array) -> tuple[float, tuple[str, ...], Array]:
    """Return the condition number of scaled JᵀJ, parameters in its null space, standard errors.

    A column of J is null if a change of the coordinate by 1 (of a linear coordinate: by its own
    size) changes the residuals by less than 1e-7 of the change by the most sensitive coordinate.
    Standard errors [P] of unidentified parameters are infinite.
    """
    r_Sn, J_SPn = problem.slopes(x_P[None])
    J_nP = J_SPn[0].T
    reach_P = np.where(problem.log_P, 1.0, np.maximum(np.abs(x_P), 1e-3))
    size_P = np.linalg.norm(J_nP, axis=0) * reach_P
    seen = np.flatnonzero(size_P > NULL * size_P.max(initial=1e-300))
    null = set(range(len(x_P))) - set(seen.tolist())
    errors_P = np.full(len(x_P), np.inf)
    if not len(seen):
        return float("inf"), tuple(p.name for p in problem.free), errors_P
    length_P = np.linalg.norm(J_nP[:, seen], axis=0)
    # R of the QR decomposition has J's singular values and directions, with P rows instead of n.
    triangle = np.linalg.qr(J_nP[:, seen] / length_P, mode="r")
    _, singular, directions = np.linalg.svd(triangle, full_matrices=True)
    singular = np.concatenate([singular, np.zeros(len(directions) - len(singular))])
    for direction in directions[singular <= NULL * singular[0]]:
        null |= set(seen[np.abs(direction) > SHARE].tolist())
    kept = singular > NULL * singular[0]
    freedom = max(len(r_Sn[0]) - len(x_P), 1)
    noise = 1.4826 * float(np.median(np.abs(r_Sn[0]))) * np.sqrt(len(r_Sn[0]) / freedom)
    spread_P = np.linalg.norm(directions[kept] / singular[kept, None], axis=0)
    errors_P[seen] = noise * spread_P / length_P
    errors_P[list(null)] = np.inf
    condition = np.inf if null else float((singular[0] / singular[-1]) ** 2)
    return float(condition), tuple(problem.free[i].name for i in sorted(null)), errors_P
