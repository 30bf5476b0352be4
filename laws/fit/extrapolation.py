"""How wrong a law's form is beyond the data, by folds that are cut where data end."""

# n rows, K folds, B samples, P free parameters

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from allometry.laws.fit.engine import Fit
from allometry.laws.fit.plain import plain_numbers
from allometry.laws.fit.refit import refit
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

CUTS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the distinct values of the fold's axis that a fold is fitted to."""
SAMPLES = 40
"""Bootstrap samples of a fold, for the part of its errors that its parameters explain."""
PERTURBED = 2


@dataclass(frozen=True)
class FormError:
    """What folds were wrong by on rows beyond their data, and what of it is no fault of the form.

    By held-out row, of the K folds one after the other: ``fold_n``; ``error_n``, predicted less
    measured on the form's scale; ``sd_n``, of the fold's parameters and the scatter of its rows
    together; ``distance_n``, how far beyond the fold's data the row lies.

    The form's discrepancy is taken for a random walk in the log of the distance (a Brownian prior,
    as in Kennedy & O'Hagan, J. R. Stat. Soc. B 63, 2001, "Bayesian calibration of computer
    models"): its half width is scale x sqrt(distance). The scale is set as a conformal half width
    is (Vovk et al. 2005; Lei et al., arXiv 1604.04173), by held-out rows: the least with which
    *each* fold has the share ``level`` of its rows within the combined interval. Rows of a fold
    lie off together, so they do not count as many; hence the worst fold and not the mean of all.
    Where the law is the truth, parameters and scatter explain the errors and the scale is mostly 0.
    No coverage is guaranteed: folds beyond the data are not exchangeable with what comes after.
    """

    fold_n: NDArray[np.int64]
    error_n: Array
    sd_n: Array
    distance_n: Array

    def scale(self, level: float) -> float:
        """Return the half width at a distance of 1 (a factor of e), on the form's scale."""
        from scipy.special import ndtri

        z = float(ndtri(0.5 + level / 2))
        open_n = np.sqrt(np.maximum(self.error_n**2 - (z * self.sd_n) ** 2, 0.0))
        needed_n = open_n / np.sqrt(self.distance_n)
        folds = np.unique(self.fold_n)
        return max(float(np.quantile(needed_n[self.fold_n == fold], level)) for fold in folds)

    def half_width(self, distance_n: Array, level: float) -> Array:
        """Return the half width [n] at these distances, on the form's scale; 0 at 0."""
        return np.asarray(self.scale(level) * np.sqrt(distance_n))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, which ``from_json`` reads."""
        names = ("error_n", "sd_n", "distance_n")
        numbers = {name: plain_numbers(getattr(self, name)) for name in names}
        return {"fold_n": self.fold_n.tolist(), **numbers}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the errors of ``to_json``."""
        names = ("error_n", "sd_n", "distance_n")
        arrays = [np.array(data[name], np.float64) for name in names]
        return cls(np.array(data["fold_n"], np.int64), *arrays)


def extents(form: Form, observations: Observations) -> dict[str, Array]:
    """Return what distances are measured along: the log of each positive input, and of 6 N D."""
    logs = {
        one.name: np.log(observations[one.name])
        for one in form.inputs
        if one.positive and one.name in observations.columns
    }
    if "N" in logs and "D" in logs:
        logs["6ND"] = np.log(6.0) + logs["N"] + logs["D"]
    return logs


def distance(form: Form, fitted: Observations, asked: Observations) -> Array:
    """Return how far [n] rows lie outside of the fitted ones: the largest natural log of a ratio.

    Of each positive input to its fitted range, and of 6 N D, which may leave its range while N and
    D are within theirs.
    """
    inside, outside_n = extents(form, fitted), np.zeros(len(asked))
    for name, at_n in extents(form, asked).items():
        if name in inside:
            low, high = float(inside[name].min()), float(inside[name].max())
            outside_n = np.maximum(outside_n, np.maximum(low - at_n, at_n - high))
    return outside_n


def far_axis(form: Form, observations: Observations) -> Array | None:
    """Return what grows towards predictions [n], by which folds are cut; None: the law has none.

    Compute (N D, or C), else one of N, D; of laws that read the loss, its fall. Laws of whole
    curves have none: their forecasts carry an error of their own (``laws/forecast.py``).
    """
    logs = extents(form, observations)
    if "step" in observations.columns and observations.curves:
        return None
    for name in ("6ND", "C", "N", "D"):
        if name in logs:
            return logs[name]
    return -logs["loss"] if "loss" in logs else None


def form_error(fit: Fit, seed: int = 0) -> FormError | None:
    """Return the errors of up to five folds, each fitted to the rows below a cut of ``far_axis``.

    Folds are searched for from the optimum of all rows. None: the law has no such axis, or no fold
    has more distinct rows than parameters.
    """
    far_n = far_axis(fit.form, fit.observations)
    if far_n is None:
        return None
    levels = np.unique(far_n)
    cuts = {levels[max(int(np.ceil(share * len(levels))), 1) - 1] for share in CUTS}
    parts = [_fold(fit, far_n <= cut, seed + k) for k, cut in enumerate(sorted(cuts))]
    folds = [part for part in parts if part is not None]
    if not folds:
        return None
    numbers = [np.full(len(errors), k) for k, (errors, _, _) in enumerate(folds)]
    columns = (np.concatenate(column) for column in zip(*folds, strict=True))
    return FormError(np.concatenate(numbers), *columns)


def _fold(fit: Fit, kept_n: NDArray[np.bool_], seed: int) -> tuple[Array, Array, Array] | None:
    """Errors, standard deviations and distances of the rows that are not kept."""
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
    good_B = np.isfinite(x_BP).all(axis=1)
    if not good_B[0] or good_B.sum() < 3:
        return None
    residual_Bn = problem.residuals(x_BP[good_B])
    error_n = residual_Bn[0]
    low_n, high_n = np.nanquantile(residual_Bn[1:], (0.1587, 0.8413), axis=0)
    freedom = max(int(kept_n.sum()) - len(problem.free), 1)
    scatter = float((error_n[kept_n] ** 2).sum()) / freedom
    sd_n = np.sqrt(((high_n - low_n) / 2) ** 2 + scatter)
    distance_n = distance(fit.form, rows.take(kept_n), rows)
    told_n = ~kept_n & (distance_n > 0.0) & np.isfinite(error_n) & np.isfinite(sd_n)
    return (error_n[told_n], sd_n[told_n], distance_n[told_n]) if told_n.any() else None
