"""Held-out errors of a law."""

# n held-out rows, G groups, B fits

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.distance import distance
from allometry.laws.fit.engine import Fit, FitOptions, check_enough, fit
from allometry.laws.fit.problem import Problem
from allometry.laws.fit.refit import refit
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

FEWEST_SAMPLES = 20
"""Minimum number of samples without a group for an interval of the group."""
FOLD_STARTS = 8
"""Number of perturbed starts of a fold, in addition to the optimum of all rows."""


@dataclass(frozen=True)
class HeldOut:
    """Rows predicted by a fit without them.

    ``errors``: predicted/measured - 1 (predicted minus measured if the form's residuals are
    linear). ``mean``, ``max``: of their sizes. ``interval``: (low [n], high [n]) of one run at
    ``level``, by fits without the row; NaN if unknown. ``notes``: groups left out, with reasons.
    ``at_bounds``: parameters at a bound in at least one fold. ``fold``: the fit that predicted all
    rows, if there is a single one.
    """

    groups: tuple[str, ...]
    predicted: Array
    measured: Array
    relative: bool = True
    interval: tuple[Array, Array] | None = None
    level: float = 0.95
    notes: tuple[str, ...] = ()
    at_bounds: tuple[str, ...] = ()
    fold: Fit | None = None

    @property
    def covered(self) -> tuple[int, int] | None:
        """Number of rows within their interval, and number of rows with an interval."""
        if self.interval is None:
            return None
        low_n, high_n = self.interval
        inside_n = (low_n <= self.measured) & (self.measured <= high_n)
        return int(inside_n.sum()), int(np.isfinite(low_n).sum())

    @property
    def errors(self) -> Array:
        """Error of each row."""
        if self.relative:
            return np.asarray(self.predicted / self.measured - 1.0)
        return np.asarray(self.predicted - self.measured)

    @property
    def mean(self) -> float:
        """Mean size of an error."""
        return float(np.abs(self.errors).mean())

    @property
    def max(self) -> float:
        """Largest size of an error."""
        return float(np.abs(self.errors).max())


def leave_one_group_out(
    form: Form,
    observations: Observations,
    options: FitOptions | None = None,
    *,
    sampled: Bootstrap | None = None,
    level: float = 0.95,
) -> HeldOut:
    """Return every row, predicted by the fit to all other groups.

    All folds are fitted in one batch, each from the optimum of all rows and eight points around it.
    A group without which the law cannot be fitted is left out with a note. ``sampled``: a bootstrap
    of the same rows, for intervals (``out_of_bag``). Raises UserError: there are fewer than two
    groups, or no group can be held out; or as ``fit``.
    """
    names, index_n = np.unique(np.array(observations.groups), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"all observations belong to group {str(names[0])!r}, so none can be held out; give "
            f"rows of at least two runs"
        )
    whole = sampled.fit if sampled is not None else fit(form, observations, options)
    problem = whole.problem()
    failed = _too_small(problem, observations, index_n)
    keep_Gn = (index_n[None, :] != np.arange(len(names))[:, None]).astype(np.float64)
    loss, seed = whole.options.make_loss(), whole.options.seed
    x_GP = refit(problem, loss, problem.coordinates(whole.values), keep_Gn, FOLD_STARTS, seed)
    predicted_n = np.full(len(observations), np.nan)
    for group in range(len(names)):
        rows = index_n == group
        if not np.isfinite(x_GP[group]).all():
            failed.setdefault(group, "no search reached a finite objective")
        if group not in failed:
            prepared = form.prepare(observations.take(rows))
            predicted_n[rows] = form.target.clip(
                form.predict(problem.values_at(x_GP[group]), prepared)
            )
    if len(failed) == len(names):
        raise UserError(f"no group can be held out: {next(iter(failed.values()))}")
    told_n = ~np.isin(index_n, list(failed))
    x_FP = x_GP[[group for group in range(len(names)) if group not in failed]]
    edge_FP = (x_FP <= problem.low_P) | (x_FP >= problem.high_P)
    interval = None if sampled is None else out_of_bag(sampled, level)
    if interval is not None:
        interval = (interval[0][told_n], interval[1][told_n])
    return HeldOut(
        tuple(np.array(observations.groups)[told_n].tolist()),
        predicted_n[told_n],
        observations[form.target.name][told_n],
        form.residual == "log",
        interval,
        level,
        tuple(
            f"group {str(names[group])!r} is not held out: {why}" for group, why in failed.items()
        ),
        tuple(p.name for i, p in enumerate(problem.free) if edge_FP[:, i].any()),
    )


def _too_small(
    problem: Problem, observations: Observations, index_n: NDArray[np.intp]
) -> dict[int, str]:
    """Return groups without which fewer rows than parameters remain, and the error message."""
    failed = {}
    for group in range(int(index_n.max()) + 1):
        try:
            check_enough(problem, observations.take(index_n != group))
        except UserError as error:
            failed[group] = str(error)
    return failed


def out_of_bag(sampled: Bootstrap, level: float = 0.95) -> tuple[Array, Array] | None:
    """Return intervals (low [n], high [n]) of one run for each fitted row, by fits without the row.

    From the samples that did not draw the row's group, as in jackknife+-after-bootstrap (Kim, Xu &
    Barber, arXiv 2002.09025), widened by the form's error if the group is outside of all others.
    NaN if fewer than 20 samples lack the group; None for a bootstrap that was read from a file.
    """
    if sampled.drawn_BG is None:
        return None
    rows, form = sampled.fit.observations, sampled.fit.form
    names, index_n = np.unique(np.array(rows.groups), return_inverse=True)
    low_n, high_n = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for group in range(len(names)):
        without_B, mine_n = ~sampled.drawn_BG[:, group], index_n == group
        if without_B.sum() < FEWEST_SAMPLES:
            continue
        few = replace(sampled, values_BP=sampled.values_BP[without_B])
        held = rows.take(mine_n)
        far_n = distance(form, rows.take(~mine_n), held)
        spread = few.spread(held, level, noise=True, far_n=far_n)
        low_n[mine_n], high_n[mine_n] = spread.low_n, spread.high_n
    return low_n, high_n


def hold_out_largest(
    form: Form,
    observations: Observations,
    by: str,
    options: FitOptions | None = None,
    number: int = 1,
    *,
    samples: int = 0,
    level: float = 0.95,
) -> HeldOut:
    """Return the rows with the ``number`` largest values of column ``by``, predicted by the others.

    ``samples``: of a bootstrap of the other rows, for intervals at ``level``; 0 for no intervals.
    There are also no intervals if the other rows do not identify the law. Raises UserError: the
    column is missing or has too few values; or as ``fit``.
    """
    values_n = observations[by]
    levels = np.unique(values_n)
    if not 1 <= number < len(levels):
        raise UserError(
            f"cannot hold out the {number} largest of {by}: the observations have {len(levels)} "
            f"values of it and some must remain; hold out fewer or add runs"
        )
    held_n = values_n >= levels[-number]
    fitted = fit(form, observations.take(~held_n), options)
    held, interval = observations.take(held_n), None
    if samples and len(set(fitted.observations.groups)) > 1 and not fitted.unidentified:
        sampled = bootstrap(fitted, samples, fitted.options.seed)
        interval = sampled.predict_interval(held, level, noise=True)
    return HeldOut(
        held.groups,
        fitted.predict(held),
        held[form.target.name],
        form.residual == "log",
        interval,
        level,
        at_bounds=fitted.certificate.at_bounds,
        fold=fitted,
    )
