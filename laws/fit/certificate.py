"""What shows that a fit found its optimum, and that the data say what it is."""

# S starts, n rows, P free parameters

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.problem import Problem
from allometry.laws.fit.solver import Solved

Array = NDArray[np.float64]

AGREEMENT = 1e-6
"""Starts agree whose objectives lie within this relative distance of the best one."""
ROUNDING = 1e-24
"""Objectives of a row below which a fit is exact, so that only rounding tells starts apart."""
NULL = 1e-7
"""Singular values below this share of the largest are directions that the data do not see."""
SHARE = 0.1
"""Least part of a parameter in such a direction for its name to be given."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How sure an optimum is.

    ``gradient_norm``: of the summed objective, by search coordinates (logs of parameters of log
    scale), 0 where a bound stops the descent. ``decrease``: what one more step would gain, relative
    to the objective. ``starts``: how many there were, ``finished``: those that were searched from
    to the end (not given up by successive halving), ``agreeing``: those of them that ended within
    1e-6 of the best objective; ``spread``: the largest difference of a search coordinate among
    these. ``at_bounds``: parameters on a bound. ``condition``: of the Gauss-Newton
    matrix JᵀJ with its columns scaled to length 1 (infinite where it is singular).
    ``unidentified``: parameters that can move, alone or together, without moving a prediction.
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

    def to_json(self) -> dict[str, Any]:
        """Return plain values, which ``from_json`` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the certificate of ``to_json``."""
        names = {name: tuple(data[name]) for name in ("at_bounds", "unidentified")}
        return cls(**{**data, **names})


def certify(problem: Problem, solved: Solved, counts_S: NDArray[np.int64]) -> Certificate:
    """Return the certificate of the best of the searches; ``counts_S`` starts each stands for."""
    best = int(np.argmin(solved.objective_S))
    objective = float(solved.objective_S[best])
    x_P = solved.x_SP[best]
    agree_S = solved.finished_S & (
        solved.objective_S <= objective * (1.0 + AGREEMENT) + ROUNDING * len(problem.target_n)
    )
    spread = float(np.ptp(solved.x_SP[agree_S], axis=0).max(initial=0.0))
    at_bounds = (x_P <= problem.low_P) | (x_P >= problem.high_P)
    condition, unidentified = identifiability(problem, x_P)
    gain = float(solved.decrease_S[best])
    return Certificate(
        gradient_norm=float(np.linalg.norm(solved.gradient_SP[best])),
        decrease=gain / objective if objective > 0.0 else 0.0,
        starts=int(counts_S.sum()),
        finished=int(counts_S[solved.finished_S].sum()),
        agreeing=int(counts_S[agree_S].sum()),
        spread=spread,
        at_bounds=tuple(p.name for p, at in zip(problem.free, at_bounds, strict=True) if at),
        condition=condition,
        unidentified=unidentified,
    )


def identifiability(problem: Problem, x_P: Array) -> tuple[float, tuple[str, ...]]:
    """Return the condition number of scaled JᵀJ and the names that null directions move.

    A column of J is null by itself where moving the coordinate by 1 moves the residuals by less
    than 1e-7 of what the most telling coordinate does.
    """
    if not problem.free:
        return 1.0, ()
    J_nP = problem.slopes(x_P[None])[1][0].T
    size_P = np.linalg.norm(
        J_nP * np.where(problem.log_P, 1.0, np.maximum(np.abs(x_P), 1e-3)), axis=0
    )
    seen_P = size_P > NULL * size_P.max(initial=1e-300)
    names = {p.name for p, seen in zip(problem.free, seen_P, strict=True) if not seen}
    length_P = np.linalg.norm(J_nP[:, seen_P], axis=0)
    if not seen_P.any():
        return float("inf"), tuple(p.name for p in problem.free)
    _, singular, directions = np.linalg.svd(J_nP[:, seen_P] / length_P, full_matrices=True)
    singular = np.concatenate([singular, np.zeros(len(directions) - len(singular))])
    seen = [p for p, is_seen in zip(problem.free, seen_P, strict=True) if is_seen]
    for direction in directions[singular <= NULL * singular[0]]:
        names |= {p.name for p, part in zip(seen, direction, strict=True) if abs(part) > SHARE}
    condition = np.inf if names else float((singular[0] / singular[-1]) ** 2)
    return float(condition), tuple(p.name for p in problem.free if p.name in names)
