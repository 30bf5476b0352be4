"""Best learning rate of a sweep, and its drift between sizes."""

# S seeds, R learning rates; losses_RS in nats per token, infinite for a run that diverged

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Optimum:
    """Minimum of the loss: ``log2_lr`` and ``loss`` of a parabola's vertex.

    ``problem``: the reason for a missing interior optimum; the values are then of the best point.
    """

    log2_lr: float
    loss: float
    problem: str | None = None

    @property
    def interior(self) -> bool:
        """True if both neighbours of the best point were run and are finite."""
        return self.problem is None


def quadratic_optimum(log2_lrs: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Return the vertex of the parabola through the best point and its two neighbours.

    Points may have any order and distances; a loss that is not finite is of a run that diverged. A
    vertex of 0 or less for positive losses is not an optimum. For example,
    ``quadratic_optimum([-9, -8, -7], [3.1, 3.0, 3.2]).log2_lr``.
    """
    order = np.argsort(log2_lrs)
    x = np.asarray(log2_lrs, np.float64)[order]
    y = np.where(np.isfinite(losses), losses, np.inf)[order]
    assert len(np.unique(x)) == len(x), "two losses for one learning rate"
    best = int(np.argmin(y))
    here = Optimum(float(x[best]), float(y[best]))
    if not np.isfinite(here.loss):
        return Optimum(here.log2_lr, here.loss, "every run diverged")
    if best in (0, len(x) - 1):
        end = "least" if best == 0 else "largest"
        return Optimum(here.log2_lr, here.loss, f"the best rate is the {end} that was tried")
    if not np.isfinite(y[best - 1 : best + 2]).all():
        return Optimum(here.log2_lr, here.loss, "a neighbour of the best rate diverged")
    (x0, x1, x2), (y0, y1, y2) = x[best - 1 : best + 2], y[best - 1 : best + 2]
    slope_left, slope_right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (slope_right - slope_left) / (x2 - x0)
    if curvature <= 0.0:  # three equal losses
        return Optimum(here.log2_lr, here.loss, "the losses around the best rate are equal")
    # Newton's form: y0 + slope_left (x - x0) + curvature (x - x0)(x - x1).
    vertex = float((x0 + x1 - slope_left / curvature) / 2)
    loss = y0 + slope_left * (vertex - x0) + curvature * (vertex - x0) * (vertex - x1)
    if loss <= 0.0 < y1:  # a neighbour that diverged with finite weights
        return Optimum(here.log2_lr, here.loss, "a neighbour of the best rate is no part of a bowl")
    return Optimum(vertex, float(loss))


@dataclass(frozen=True, slots=True)
class Sweep:
    """Losses of one size: ``losses_RS`` [R, S] at ``log2_lrs``, with equal seeds at every rate."""

    log2_lrs: tuple[float, ...]
    losses_RS: NDArray[np.float64]

    def optimum(self, seeds: Sequence[int] | None = None) -> Optimum:
        """Return the optimum of the mean over seeds (columns; None: all)."""
        chosen = self.losses_RS if seeds is None else self.losses_RS[:, list(seeds)]
        return quadratic_optimum(self.log2_lrs, chosen.mean(axis=1).tolist())

    def spread(self) -> float:
        """Return max - min of log2 of the best rate over single seeds.

        NaN if a seed has no optimum, or if there is only one seed.
        """
        if self.losses_RS.shape[1] < 2:
            return float("nan")
        return _drift([self.optimum([seed]) for seed in range(self.losses_RS.shape[1])])


def drift(sweeps: Mapping[int, Sweep]) -> float:
    """Return max - min over sizes of log2 of the best rate of the means (NaN: one is missing)."""
    return _drift([sweep.optimum() for sweep in sweeps.values()])


def drift_interval(sweeps: Mapping[int, Sweep], level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the drift over seeds.

    A resample draws seeds with replacement, equal for all sizes and rates, because a seed
    determines their data and initial values. Resamples without an interior optimum are left out;
    returns (NaN, NaN) if these are more than half, or with fewer than two seeds.
    """
    return _interval(sweeps, level, _drift)


def exponent(sweeps: Mapping[int, Sweep]) -> float:
    """Return the slope of log2 of the best rate of the means on log2 of the size, by least squares.

    NaN if an optimum is at an edge, or if there is only one size.
    """
    return _slope([*sweeps], [sweep.optimum() for sweep in sweeps.values()])


def exponent_interval(sweeps: Mapping[int, Sweep], level: float = 0.95) -> tuple[float, float]:
    """Return the bootstrap interval of the exponent over seeds, as in ``drift_interval``."""
    return _interval(sweeps, level, partial(_slope, [*sweeps]))


def _interval(
    sweeps: Mapping[int, Sweep], level: float, statistic: Callable[[Sequence[Optimum]], float]
) -> tuple[float, float]:
    number = next(iter(sweeps.values())).losses_RS.shape[1]
    if number < 2:
        return float("nan"), float("nan")
    random = np.random.default_rng(0)
    statistics = []
    for _ in range(RESAMPLES):
        seeds = [int(random.integers(number)) for _ in range(number)]
        statistics.append(statistic([sweep.optimum(seeds) for sweep in sweeps.values()]))
    kept = np.array(statistics)[np.isfinite(statistics)]
    if len(kept) < RESAMPLES / 2:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _drift(optima: Sequence[Optimum]) -> float:
    if not all(optimum.interior for optimum in optima):
        return float("nan")
    return float(np.ptp([optimum.log2_lr for optimum in optima]))


def _slope(sizes: Sequence[int], optima: Sequence[Optimum]) -> float:
    if len(optima) < 2 or not all(optimum.interior for optimum in optima):
        return float("nan")
    x = np.log2(np.asarray(sizes, np.float64))
    centred = x - x.mean()
    rates = np.array([optimum.log2_lr for optimum in optima])
    return float(centred @ rates / (centred @ centred))
