"""Optimal transport between documents and a target: distances, duals and shares of sources.

The costs are squared Euclidean distances of embeddings. POT is imported on use.
"""

# N documents, M examples of the target, F features, S sources, n documents of one source

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.data.select.features import require

Floats = NDArray[np.float64]
_ITERATIONS = 10_000_000
_ROWS_AT_ONCE = 4096


def squared_distances(rows_NF: Any, rows_MF: Any) -> Floats:
    """Return the squared Euclidean distances (N, M) of rows, sparse or dense.

    For example, ``squared_distances(np.eye(2), np.eye(2))`` is [[0, 2], [2, 0]].
    """
    products = rows_NF @ rows_MF.T
    products = products.toarray() if hasattr(products, "toarray") else np.asarray(products)
    made = _squares(rows_NF)[:, None] + _squares(rows_MF)[None, :] - 2.0 * products
    return np.maximum(made.astype(np.float64), 0.0)


def _squares(rows: Any) -> Floats:
    squares = rows.multiply(rows) if hasattr(rows, "multiply") else rows * rows
    return np.asarray(squares.sum(1), np.float64).ravel()


def distance(costs_NM: Floats, weights_N: Floats) -> tuple[float, Floats]:
    """Return the optimal transport distance to the target, and the target's dual values (M).

    ``weights_N`` are the masses of the documents (sum 1); each example of the target has the mass
    1/M. The network simplex algorithm of POT (``ot.emd2``) solves the problem exactly. An entropic
    solution (Sinkhorn) is larger: 8.7 instead of 5.8 between samples of two Gaussians, at 0.05 of
    the largest cost. The distance is sum_i w_i f_i + mean(g) with ``f = documents_dual(costs, g)``.

    Raises:
        UserError: POT is not installed, or its solver stopped early.
    """
    ot = require("ot", "POT")
    used = weights_N > 0.0
    examples_M = np.full(costs_NM.shape[1], 1.0 / costs_NM.shape[1])
    found, log = ot.emd2(
        weights_N[used] / weights_N.sum(),
        examples_M,
        np.ascontiguousarray(costs_NM[used]),
        numItermax=_ITERATIONS,
        log=True,
    )
    if log["warning"] is not None:
        raise UserError(
            f"optimal transport of {int(used.sum())} documents to {len(examples_M)} examples was "
            f"not solved ({log['warning']}); lower --samples"
        )
    return float(found), np.asarray(log["v"], np.float64)


def documents_dual(costs_NM: Floats, target_M: Floats) -> Floats:
    """Return the dual value of each document, min_j c_ij - g_j (N), for the target's dual g.

    It is defined for documents outside of the transport problem too: it is the derivative of the
    distance by the mass of the document, up to a common constant. The documents with the lowest
    values reduce the distance most (GOT-D, arXiv 2405.02774). For example, with g = 0 it is the
    cost of the nearest example.
    """
    return np.concatenate(
        [
            (costs_NM[at : at + _ROWS_AT_ONCE] - target_M).min(1)
            for at in range(0, len(costs_NM), _ROWS_AT_ONCE)
        ]
    )


@dataclass(frozen=True)
class Screen:
    """Distances of sources and of their mixture to a target.

    ``alone``: distance of each source (S). ``mixture``: distance of the mixture with the given
    shares. ``slopes``: derivative of that distance by the share of a source, taken from all
    sources in proportion to their shares (S). ``shares``: shares of the least distance (S),
    ``least``: that distance, ``bound``: a lower bound on the distance of every mixture.
    """

    alone: Floats
    mixture: float
    slopes: Floats
    shares: Floats
    least: float
    bound: float


def screen(
    costs: Sequence[Floats], shares_S: Floats, *, within: float = 1e-3, rounds: int = 50
) -> Screen:
    """Compare mixtures of sources by their distance to a target.

    ``costs`` are the costs (n, M) of each source's documents, which share the source's mass
    equally. The distance is convex and piecewise linear in the shares, and each solution gives a
    lower bound on all mixtures, sum_i p_i mean(f_i) + mean(g). The least distance is the minimum of
    these bounds (Kelley's cutting planes), to the relative gap ``within`` or after ``rounds``
    solutions. The slopes are mean(f_i) - sum_k p_k mean(f_k); arXiv 2307.02460
    subtracts the mean over the other sources instead.

    For example, ``screen([costs_web, costs_code], np.array([0.7, 0.3])).slopes``.

    Raises UserError like ``distance``.
    """
    problem = _Problem(costs)
    alone = np.array([problem.solve(row)[0] for row in np.eye(len(costs))])
    mixture, duals_S = problem.solve(shares_S)
    bound = -np.inf
    for _ in range(rounds):
        proposed_S, bound = problem.proposal()
        if problem.least - bound <= within * problem.least:
            break
        problem.solve(proposed_S)
    slopes = duals_S - duals_S @ shares_S
    return Screen(alone, mixture, slopes, problem.best, problem.least, min(bound, problem.least))


class _Problem:
    """The distance as a function of the shares, with the lower bounds of its solutions so far."""

    def __init__(self, costs: Sequence[Floats]) -> None:
        self._counts = [len(one) for one in costs]
        self._costs_NM = np.concatenate(list(costs))
        self._bounds: list[Floats] = []
        self.least, self.best = np.inf, np.zeros(len(costs))

    def solve(self, shares_S: Floats) -> tuple[float, Floats]:
        """Return the distance of a mixture, and the mean dual value of each source (S)."""
        counts = np.array(self._counts)
        value, target_M = distance(self._costs_NM, np.repeat(shares_S / counts, counts))
        dual_N = documents_dual(self._costs_NM, target_M)
        parts = np.split(dual_N, np.cumsum(counts)[:-1])
        means_S = np.array([part.mean() for part in parts])
        self._bounds.append(means_S + target_M.mean())
        if value < self.least:
            self.least, self.best = value, shares_S
        return value, means_S

    def proposal(self) -> tuple[Floats, float]:
        """Return the shares at which the largest lower bound is least, and that bound."""
        from scipy.optimize import linprog

        bounds_KS = np.array(self._bounds)
        count, sources = bounds_KS.shape
        solved = linprog(
            [*[0.0] * sources, 1.0],
            A_ub=np.column_stack([bounds_KS, -np.ones(count)]),
            b_ub=np.zeros(count),
            A_eq=[[*[1.0] * sources, 0.0]],
            b_eq=[1.0],
            bounds=[*[(0.0, 1.0)] * sources, (None, None)],
        )
        shares_S = np.clip(solved.x[:-1], 0.0, 1.0)
        return shares_S / shares_S.sum(), float(solved.fun)
