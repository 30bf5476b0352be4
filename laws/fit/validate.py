"""How well a law predicts what it was not fitted to."""

# n held-out rows, G groups, B fits

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import FitOptions, check_enough, fit
from allometry.laws.fit.refit import refit
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

FOLD_STARTS = 8
"""Perturbed starts of a fold, beside the optimum of all rows."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that were predicted by a fit without them.

    ``errors``: predicted/measured - 1 (of a form whose residuals are linear: predicted less
    measured). ``mean``, ``max``: of their sizes.
    """

    groups: tuple[str, ...]
    predicted: Array
    measured: Array
    relative: bool = True

    @property
    def errors(self) -> Array:
        """The error of each row."""
        if self.relative:
            return np.asarray(self.predicted / self.measured - 1.0)
        return np.asarray(self.predicted - self.measured)

    @property
    def mean(self) -> float:
        """The mean size of an error."""
        return float(np.abs(self.errors).mean())

    @property
    def max(self) -> float:
        """The largest size of an error."""
        return float(np.abs(self.errors).max())


def leave_one_group_out(
    form: Form, observations: Observations, options: FitOptions | None = None
) -> HeldOut:
    """Return every row, predicted by the fit to all other groups.

    All folds are searched for at once, each from the optimum of all rows and eight points around.
    Raises UserError if there are fewer than two groups; what ``fit`` raises, for the rows of a fold
    too.
    """
    names, index_n = np.unique(np.array(observations.groups), return_inverse=True)
    if len(names) < 2:
        raise UserError(
            f"all observations belong to group {str(names[0])!r}, so none can be held out; give "
            f"rows of at least two runs"
        )
    whole = fit(form, observations, options)
    problem = whole.problem()
    for group in range(len(names)):
        check_enough(problem, observations.take(index_n != group))
    keep_Gn = (index_n[None, :] != np.arange(len(names))[:, None]).astype(np.float64)
    loss, seed = whole.options.make_loss(), whole.options.seed
    x_GP = refit(problem, loss, problem.coordinates(whole.values), keep_Gn, FOLD_STARTS, seed)
    predicted_n = np.empty(len(observations))
    for group, name in enumerate(names):
        rows = index_n == group
        if not np.isfinite(x_GP[group]).all():
            raise UserError(
                f"{form.name} cannot be fitted without group {str(name)!r}; hold out something else"
            )
        prepared = form.prepare(observations.take(rows))
        predicted_n[rows] = form.predict(problem.values_at(x_GP[group]), prepared)
    return HeldOut(
        observations.groups, predicted_n, observations[form.target.name], form.residual == "log"
    )


def hold_out_largest(
    form: Form,
    observations: Observations,
    by: str,
    options: FitOptions | None = None,
    number: int = 1,
) -> HeldOut:
    """Return the rows with the ``number`` largest values of column ``by``, predicted by the others.

    Raises UserError if the column is missing or has too few values; what ``fit`` raises.
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
    held = observations.take(held_n)
    return HeldOut(
        held.groups, fitted.predict(held), held[form.target.name], form.residual == "log"
    )
