"""Fit of the cost model's constants to measured steps of many sources."""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

from allometry.scaling.planner.calibrate import (
    GENERATIONS,
    Calibration,
    by_mean,
    check_seconds,
    errors,
    logs_of,
    slopes,
    soften,
)
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats

ROWS_OF_SOURCE = 150  # maximum weight of a source: errors of its rows are correlated


def calibrate(cases: Cases, seconds: Floats, sources: Floats) -> Calibration:
    """Fit the constants to measured step times, (C,), of ``sources``, (C,).

    Least squares of logarithms with a loss that flattens beyond ``NOISE``. Each source and each
    card generation has deviations from the common constants, with prior widths (``Constants``:
    ``between``, ``card``), which separates a framework's own deviations. Constants without data
    keep the prior. Raises UserError for times that are not positive. For example,
    ``calibrate(cases, seconds, np.full(len(cases), "our runs"))``.
    """
    check_seconds(seconds)
    names, index, counts = np.unique(sources, return_inverse=True, return_counts=True)
    weight, measured = np.sqrt(np.minimum(ROWS_OF_SOURCE / counts, 1.0))[index], np.log(seconds)
    between, k = Constants.spreads("between"), len(Constants.names())
    before = Calibration.before()
    cards = np.tile(Constants.spreads("card")[Constants.of_card()], len(GENERATIONS))
    spread = np.concatenate([Constants.spreads("spread"), cards])
    d = len(spread)

    def split(x: Floats) -> tuple[Floats, Floats]:
        return before.mean + x[:d] * spread, x[d:].reshape(-1, k) * between

    def logs(x: Floats) -> Floats:
        mean, own = split(x)
        return logs_of(mean, cases) + own[index]

    def residuals(x: Floats) -> Floats:
        return np.concatenate([soften(errors(cases, logs(x), measured), weight)[0], x])

    def jacobian(x: Floats) -> Floats:
        at = logs(x)
        soft = soften(errors(cases, at, measured), weight)[1][:, None]
        slope = soft * slopes(cases, at)
        own = np.zeros((len(cases), len(names), k))
        own[np.arange(len(cases)), index] = slope * between
        block = [by_mean(cases, slope) * spread, own.reshape(len(cases), -1)]
        return np.concatenate([np.concatenate(block, axis=1), np.eye(len(x))])

    found = least_squares(residuals, np.zeros(d + k * len(names)), jacobian, max_nfev=60)
    mean, own = split(found.x)
    left = np.linalg.inv(found.jac.T @ found.jac)[:d, :d] * np.outer(spread, spread)
    left[:k, :k] += np.diag(between**2)
    error = -errors(cases, logs(found.x), measured)
    ends = [np.quantile(error[index == i], (0.05, 0.95)) for i in range(len(names))]
    low, high = np.mean(ends, axis=0)
    return Calibration(
        mean,
        left,
        (float(low), float(high)),
        {str(name): own[i] for i, name in enumerate(names)},
        frozenset(cases.kinds),
    )
