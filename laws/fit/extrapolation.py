"""How wrong a law's form is beyond the data, by folds that are cut where data end."""

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
"""Fewer folds than this cannot tell the form's error from what else moves their predictions."""
CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the distinct values of the fold's axis that a fold is fitted to."""
SAMPLES = 40
"""Bootstrap samples of a fold, for the part of its errors that its parameters explain."""
PERTURBED = 2
NEAR = float(np.log(2.0))
"""A row nearer to a fold's data than a factor of 2 counts as that far away: it says what outliers
there are, and not how errors grow."""


@dataclass(frozen=True)
class FormError:
    """How much more a law is wrong beyond its data than its parameters and the scatter of runs say.

    ``scale``: a standard deviation, on the form's scale, for each factor of e beyond the data;
    errors are taken to grow in proportion to the log of the distance, as those of a wrong exponent
    do. ``folds``: how many said so.

    A fold is fitted to the rows up to a cut and predicts the others. Its excess is the mean square
    of its errors, less what its parameters (by bootstrap) and the scatter of its rows explain, over
    the mean square of the rows' distances: the estimate by moments of the variance between studies
    (DerSimonian & Laird, Controlled Clinical Trials 7, 1986), with the discrepancy of a model as a
    term of its own in quadrature (Kennedy & O'Hagan, J. R. Stat. Soc. B 63, 2001). The rows of one
    fold lie off together, so a fold is one measurement, and the scale is that of the worst. It is
    small where the law is the truth. One or two folds say little: nothing is then subtracted, and
    what the parameters and the scatter explain counts as the form's error where it is the larger.
    No coverage is guaranteed: what comes after the data need not be like what came within it.
    """

    scale: float
    folds: int

    def half_width(self, distance_n: Array, level: float) -> Array:
        """Return the half width [n] at these distances, on the form's scale; 0 at 0."""
        from scipy.special import ndtri

        return np.asarray(float(ndtri(0.5 + level / 2)) * self.scale * distance_n)


def form_error(fit: Fit, seed: int = 0) -> FormError | None:
    """Return the error of the form by up to five folds, fitted to the rows up to a cut.

    Cuts are along ``far_axis``. Folds are searched for from the optimum of all rows. None: the law
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
    """A fold's mean square error on the rows that are not kept, and what of it is explained.

    By its parameters and the scatter of its rows; both over the mean square of distances.
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
