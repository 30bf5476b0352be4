"""IsoFLOP profiles: the parabola of loss over ln N at each compute budget."""

# n rows, F budgets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.laws.observations import Observations

Array = NDArray[np.float64]

TOLERANCE = 0.1
"""Rows whose FLOPs exceed a budget's least by less than this share belong to it."""


@dataclass(frozen=True)
class IsoFlop:
    """One budget's parabola, loss = c0 + c1·x + c2·x² with x = ln(N / center).

    ``rows``: which observations it is through. ``N``, ``loss``: its vertex; ``D`` the tokens that
    the budget then buys. ``problem`` says why there is no vertex inside of the sizes that were
    run; N, D and loss are then those of the best row.
    """

    flops: float
    rows: NDArray[np.intp]
    center: float
    coefficients: tuple[float, float, float]
    N: float
    D: float
    loss: float
    problem: str | None = None

    def losses(self, sizes: Array) -> Array:
        """Return the parabola at these N."""
        x = np.log(sizes / self.center)
        return np.asarray(np.polynomial.polynomial.polyval(x, np.array(self.coefficients)))


def isoflop_optima(
    observations: Observations, flops_per_parameter_token: float = 6.0, tolerance: float = TOLERANCE
) -> list[IsoFlop]:
    """Return the parabola of each compute budget with at least three sizes, in order of FLOPs.

    FLOPs are the column ``C`` or, without one, ``flops_per_parameter_token``·N·D. This is the
    second approach of Hoffmann et al. (arXiv 2203.15556). Caveat: a loss that is a sum of power
    laws is no parabola in ln N, so the vertices are biased even without noise, the more so the
    wider and the less symmetric the sizes lie around the optimum (arXiv 2603.22339): use them to
    look at, and a fitted law for numbers.
    """
    sizes, losses = observations["N"], observations["loss"]
    flops = observations.columns.get("C")
    if flops is None:
        flops = flops_per_parameter_token * sizes * observations["D"]
    optima = []
    for rows in budgets(flops, tolerance):
        if len(np.unique(sizes[rows])) >= 3:
            budget = float(np.exp(np.log(flops[rows]).mean()))
            tokens = budget / flops_per_parameter_token
            optima.append(_parabola(rows, sizes[rows], losses[rows], budget, tokens))
    return optima


def budgets(flops: Array, tolerance: float = TOLERANCE) -> list[NDArray[np.intp]]:
    """Return rows of (nearly) equal FLOPs, in order; a budget begins at its least row."""
    groups: list[list[int]] = []
    for row in np.argsort(flops, kind="stable").tolist():
        if not groups or flops[row] > flops[groups[-1][0]] * (1.0 + tolerance):
            groups.append([])
        groups[-1].append(row)
    return [np.array(sorted(rows), np.intp) for rows in groups]


def _parabola(
    rows: NDArray[np.intp], sizes: Array, losses: Array, budget: float, product: float
) -> IsoFlop:
    center = float(np.exp(np.log(sizes).mean()))
    x = np.log(sizes / center)
    c0, c1, c2 = (float(c) for c in np.polynomial.polynomial.polyfit(x, losses, 2))
    best = int(np.argmin(losses))
    size, loss, problem = float(sizes[best]), float(losses[best]), None
    if not c2 > 0.0:
        problem = "the parabola has no least value"
    elif not x.min() < (vertex := -c1 / (2 * c2)) < x.max():
        problem = "the least value lies outside of the sizes that were run"
    else:
        size, loss = center * float(np.exp(vertex)), c0 - c1 * c1 / (4 * c2)
    return IsoFlop(budget, rows, center, (c0, c1, c2), size, product / size, loss, problem)


def size_exponent(optima: Sequence[IsoFlop]) -> tuple[float, float] | None:
    """Return (a, ln k) of N = k·C^a through the vertices, or None with fewer than two of them."""
    inside = [optimum for optimum in optima if optimum.problem is None]
    if len(inside) < 2:
        return None
    log_c = np.log([optimum.flops for optimum in inside])
    log_n = np.log([optimum.N for optimum in inside])
    slope, intercept = np.polyfit(log_c, log_n, 1)
    return float(slope), float(intercept)
