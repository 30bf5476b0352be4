"""Error of a law's form outside of the data, by folds that are cut along an axis."""

# n rows, K folds, B samples, P free parameters

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.distance import distance, far_axis
from allometry.laws.fit.engine import Fit
from allometry.laws.fit.refit import refit

Array = NDArray[np.float64]

FEW_FOLDS = 3
"""Number of folds below which the form's error cannot be separated from other errors."""
CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the distinct values on the fold's axis to which a fold is fitted."""
SAMPLES = 40
"""Bootstrap samples of a fold, for the part of its errors that its parameters explain."""
PERTURBED = 2
NEAR = float(np.log(2.0))
"""Minimum distance of a row from a fold's data: a factor of 2.

Errors of closer rows show outliers, not the growth of errors with the distance.
"""


@dataclass(frozen=True)
class FormError:
    """Error of a law outside of its data, in excess of parameter uncertainty and scatter of runs.

    ``scale``: a standard deviation, on the form's scale, per factor of e outside of the data;
    errors are assumed to grow in proportion to the log of the distance, like errors of a wrong
    exponent. ``folds``: number of folds.

    A fold is fitted to the rows up to a cut and predicts the others. Its excess is the mean square
    of its errors, minus the part that its parameters (by bootstrap) and the scatter of its rows
    explain, over the mean square of the rows' distances: the estimate by moments of the variance
    between studies (DerSimonian & Laird, Controlled Clinical Trials 7, 1986), with the discrepancy
    of a model as a separate term in quadrature (Kennedy & O'Hagan, J. R. Stat. Soc. B 63, 2001).
    The errors of the rows of one fold are correlated, so a fold is one measurement, and the scale
    is that of the worst fold. It is small if the law is correct. One or two folds are weak
    evidence: the explained part is then not subtracted, and counts as the form's error if it is the
    larger one. No coverage is guaranteed: errors outside of the data need not resemble errors
    within the data.
    """

    scale: float
    folds: int

    def half_width(self, distance_n: Array, level: float) -> Array:
        """Return the half width [n] at these distances, on the form's scale; 0 at 0."""
        from scipy.special import ndtri

        return np.asarray(float(ndtri(0.5 + level / 2)) * self.scale * distance_n)


def form_error(fit: Fit, seed: int = 0) -> FormError | None:
    """Return the error of the form by up to five folds, fitted to the rows up to a cut.

    Cuts are along ``far_axis``. Searches of folds start from the optimum of all rows. None: the law
    has no such axis, or no fold has more distinct rows than parameters.
    """
    far_n = far_axis(fit.form, fit.observations)
    if far_n is None:
        return None
    levels = np.unique(far_n)
    cuts = {levels[max(int(np.ceil(share * len(levels))), 1) - 1] for share in CUTS}
    parts = [_squares(fit, far_n <= cut, seed + k) for k, cut in enumerate(sorted(cuts))]
    folds = [part for part in parts if part is not None]
    if not folds:
        return None
    few = len(folds) < FEW_FOLDS
    worst = max(max(found, known) if few else found - known for found, known in folds)
    return FormError(float(np.sqrt(max(worst, 0.0))), len(folds))


def _squares(fit: Fit, kept_n: NDArray[np.bool_], seed: int) -> tuple[float, float] | None:
    """Return a fold's mean square error on the rows not in ``kept_n``, and the explained part.

    Its parameters and the scatter of its rows explain this part; both values are divided by the
    mean square of distances.
    """
    rows, problem = fit.observations, fit.problem()
    inputs = [rows[one.name][kept_n] for one in fit.form.inputs if one.name in rows.columns]
    if kept_n.all() or len(np.unique(inputs, axis=1).T) <= len(problem.free):
        return None
    groups, index_n = np.unique(np.array(rows.groups)[kept_n], return_inverse=True)
    draw = np.random.default_rng(seed)
    counts_BG = draw.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), SAMPLES)
    weights_Bn = np.zeros((SAMPLES + 1, len(rows)))
    weights_Bn[0, kept_n] = 1.0
    weights_Bn[1:, kept_n] = counts_BG[:, index_n]
    center_P, loss = problem.coordinates(fit.values), fit.options.make_loss()
    x_BP = refit(problem, loss, center_P, weights_Bn, PERTURBED, seed)
    good_B = np.asarray(np.isfinite(x_BP).all(axis=1))
    if not good_B[0] or good_B.sum() < 3:
        return None
    residual_Bn = problem.residuals(x_BP[good_B])
    error_n = residual_Bn[0]
    low_n, high_n = np.nanquantile(residual_Bn[1:], (0.1587, 0.8413), axis=0)
    freedom = max(int(kept_n.sum()) - len(problem.free), 1)
    scatter = float((error_n[kept_n] ** 2).sum()) / freedom
    known_n = ((high_n - low_n) / 2) ** 2 + scatter
    far_n = np.maximum(distance(fit.form, rows.take(kept_n), rows), NEAR)
    told_n = np.asarray(~kept_n & np.isfinite(error_n**2 - known_n))
    if not told_n.any():
        return None
    apart = float((far_n[told_n] ** 2).mean())
    return float((error_n[told_n] ** 2).mean()) / apart, float(known_n[told_n].mean()) / apart
