"""IsoFLOP profiles: the parabola of loss over ln N at each compute budget."""

# n rows, F budgets

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from allometry.laws.observations import Observations

Array = NDArray[np.float64]
Interval = tuple[float, float] | None

TOLERANCE = 0.1
"""Relative excess of FLOPs over a budget's smallest row below which a row belongs to the budget."""


@dataclass(frozen=True)
class IsoFlop:
    """Parabola of one budget, loss = c0 + c1·x + c2·x² with x = ln(N / center).

    ``rows``: indices of the fitted observations; ``trimmed``: rows of the budget that were too far
    above the best. ``N``, ``loss``: its vertex; ``D``: tokens of the budget at this N. ``problem``:
    the reason for a missing vertex inside of the range of sizes; N, D and loss are then of the best
    row.
    """

    flops: float
    rows: NDArray[np.intp]
    center: float
    coefficients: tuple[float, float, float]
    N: float
    D: float
    loss: float
    problem: str | None = None
    trimmed: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp))

    def losses(self, sizes: Array) -> Array:
        """Return the parabola at these N."""
        x = np.log(sizes / self.center)
        return np.asarray(np.polynomial.polynomial.polyval(x, np.array(self.coefficients)))


def isoflop_optima(
    observations: Observations,
    flops_per_parameter_token: float = 6.0,
    tolerance: float = TOLERANCE,
    within: float = np.inf,
) -> list[IsoFlop]:
    """Return the parabola of each compute budget with at least three sizes, in order of FLOPs.

    FLOPs are the column ``C`` or, without it, ``flops_per_parameter_token``·N·D; with both C and D
    the tokens at a vertex are interpolated from the runs of neighbouring sizes. ``within``: only
    rows whose loss exceeds the budget's least by at most this share; with fewer than three
    remaining sizes the budget has a ``problem``. This is the second approach of Hoffmann et al.
    (arXiv 2203.15556). Caveat: a sum of power laws is not a parabola in ln N, so the vertices are
    biased even without noise, more so for sizes that are spread widely or asymmetrically around the
    optimum (arXiv 2603.22339): trim, use the vertices for plots, and a fitted law for numbers. For
    example, ``[one.N for one in isoflop_optima(rows, within=0.05)]``.
    """
    sizes, losses = observations["N"], observations["loss"]
    flops = flops_of(observations, flops_per_parameter_token)
    tokens = observations.columns.get("D", flops / (flops_per_parameter_token * sizes))
    optima = []
    for rows in budgets(flops, tolerance):
        if len(np.unique(sizes[rows])) >= 3:
            near = losses[rows] <= losses[rows].min() * (1.0 + within)
            best = _parabola(rows[near], sizes, losses, flops, tokens)
            optima.append(replace(best, trimmed=rows[~near]))
    return optima


def flops_of(observations: Observations, flops_per_parameter_token: float = 6.0) -> Array:
    """Return the FLOPs of each row: column ``C``, or ``flops_per_parameter_token``·N·D."""
    if "C" in observations.columns:
        return observations["C"]
    return flops_per_parameter_token * observations["N"] * observations["D"]


def budgets(flops: Array, tolerance: float = TOLERANCE) -> list[NDArray[np.intp]]:
    """Return rows of (nearly) equal FLOPs, in order; a budget starts at its smallest row."""
    groups: list[list[int]] = []
    for row in np.argsort(flops, kind="stable").tolist():
        if not groups or flops[row] > flops[groups[-1][0]] * (1.0 + tolerance):
            groups.append([])
        groups[-1].append(row)
    return [np.array(sorted(rows), np.intp) for rows in groups]


def _parabola(
    rows: NDArray[np.intp], sizes: Array, losses: Array, flops: Array, tokens: Array
) -> IsoFlop:
    """Return the parabola of one budget's rows; the other arguments are complete columns."""
    sizes, losses, flops, tokens = (column[rows] for column in (sizes, losses, flops, tokens))
    budget = float(np.exp(np.log(flops).mean()))
    best = int(np.argmin(losses))
    if (number := len(np.unique(sizes))) < 3:
        at = (float(sizes[best]), float(tokens[best]), float(losses[best]))
        few = f"{number} of 3 sizes that a parabola takes; raise --within or drop its outliers"
        return IsoFlop(budget, rows, at[0], (at[2], 0.0, 0.0), *at, few)
    center = float(np.exp(np.log(sizes).mean()))
    x = np.log(sizes / center)
    c0, c1, c2 = (float(c) for c in np.polynomial.polynomial.polyfit(x, losses, 2))
    size, loss = float(sizes[best]), float(losses[best])
    problem: str | None = None
    if not c2 > 0.0:
        problem = "the parabola has no least value"
    elif not x.min() < (vertex := -c1 / (2 * c2)) < x.max():
        problem = "the least value lies outside of the sizes that were run"
    else:
        size, loss = center * float(np.exp(vertex)), c0 - c1 * c1 / (4 * c2)
    order = np.argsort(sizes)
    spent = np.log(flops / (sizes * tokens))[order]  # per parameter and token
    each = float(np.exp(np.interp(np.log(size), np.log(sizes)[order], spent)))
    return IsoFlop(budget, rows, center, (c0, c1, c2), size, budget / (each * size), loss, problem)


def exponent(
    optima: Sequence[IsoFlop], name: Literal["N", "D"] = "N"
) -> tuple[float, float] | None:
    """Return (a, ln k) of k·C^a for N or D at the vertices, None with fewer than two vertices."""
    inside = [optimum for optimum in optima if optimum.problem is None]
    if len(inside) < 2:
        return None
    log_c = np.log([optimum.flops for optimum in inside])
    slope, intercept = np.polyfit(log_c, np.log([getattr(one, name) for one in inside]), 1)
    return float(slope), float(intercept)


@dataclass(frozen=True)
class Resampled:
    """Percentile intervals of the vertices and exponents.

    An interval is None if fewer than half of the samples had a value. ``N``, ``D``, ``loss``: by
    budget, in the order of the optima, from the samples with a vertex; ``vertices``: share of
    samples with a vertex.
    """

    N: tuple[Interval, ...]
    D: tuple[Interval, ...]
    loss: tuple[Interval, ...]
    vertices: tuple[float, ...]
    exponents: Mapping[Literal["N", "D"], Interval]


def resampled(
    observations: Observations,
    optima: Sequence[IsoFlop],
    flops_per_parameter_token: float = 6.0,
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Resampled | None:
    """Return intervals by a bootstrap of residuals, or None without residuals.

    Draws of rows would leave too few sizes in a budget, so each sample adds residuals, drawn from
    all budgets, to the parabolas. Rows of one budget and size get the same residual: the mean of
    their residuals, scaled by sqrt(k/(k - 3)) for a budget of k sizes, whose parabola has three
    parameters; three sizes have no residuals. None if no budget has more than three sizes.
    """
    sizes = observations["N"]
    flops = flops_of(observations, flops_per_parameter_token)
    tokens = observations.columns.get("D", flops / (flops_per_parameter_token * sizes))
    fitted, pool = observations["loss"].copy(), []
    cells = []
    for one in optima:
        if one.problem is not None:
            continue
        fitted[one.rows] = one.losses(sizes[one.rows])
        residual = observations["loss"] - fitted
        of_sizes = [one.rows[sizes[one.rows] == size] for size in np.unique(sizes[one.rows])]
        cells += of_sizes
        if (k := len(of_sizes)) > 3:
            pool += [residual[rows].mean() * np.sqrt(k / (k - 3)) for rows in of_sizes]
    if not pool:
        return None
    draw = np.random.default_rng(seed)
    found: dict[str, list[list[float]]] = {"N": [], "D": [], "loss": []}
    slopes: dict[Literal["N", "D"], list[float]] = {"N": [], "D": []}
    for _ in range(samples):
        losses = fitted.copy()
        for rows, moved in zip(cells, draw.choice(pool, len(cells)), strict=True):
            losses[rows] += moved
        drawn = [_parabola(one.rows, sizes, losses, flops, tokens) for one in optima]
        drawn = [
            now if one.problem is None else replace(now, problem=one.problem)
            for one, now in zip(optima, drawn, strict=True)
        ]
        for name, rows_of in found.items():
            rows_of.append([np.nan if now.problem else getattr(now, name) for now in drawn])
        for name, values in slopes.items():
            values.append(np.nan if (power := exponent(drawn, name)) is None else power[0])
    columns = {name: np.array(rows_of).T for name, rows_of in found.items()}
    by_budget = {name: tuple(_interval(v, level) for v in rows) for name, rows in columns.items()}
    exponents = {name: _interval(np.array(values), level) for name, values in slopes.items()}
    had = tuple(np.isfinite(columns["N"]).mean(axis=1).tolist())
    return Resampled(**by_budget, vertices=had, exponents=exponents)


def _interval(values: Array, level: float) -> Interval:
    known = values[np.isfinite(values)]
    if 2 * len(known) < len(values):
        return None
    low, high = np.quantile(known, (0.5 - level / 2, 0.5 + level / 2))
    return float(low), float(high)
