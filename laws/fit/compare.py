"""Forms against each other, by what they say of rows that they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import Fit, FitOptions, fit, require_identified
from allometry.laws.fit.validate import HeldOut, hold_out_largest, leave_one_group_out
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

GROUPS = "group"
"""As ``by``: leave one group out, instead of the largest values of a column."""


@dataclass(frozen=True)
class Comparison:
    """One form's fit to all rows, and its error on held-out ones.

    ``in_sample``: mean size of the relative errors on the rows it was fitted to. ``problem``: why
    the form could not be fitted or held out; the others are then None or infinite.
    """

    form: Form
    parameters: int
    fit: Fit | None
    held_out: HeldOut | None
    in_sample: float
    problem: str | None = None

    @property
    def error(self) -> float:
        """The mean held-out error (infinite without one)."""
        return self.held_out.mean if self.held_out is not None else float("inf")


def compare(
    forms: Sequence[Form],
    observations: Observations,
    options: FitOptions | None = None,
    by: str = GROUPS,
) -> list[Comparison]:
    """Return the forms in order of their mean held-out error, those that cannot be fitted last.

    ``by``: ``"group"`` leaves out one group after the other, a column's name its largest value. A
    form that refuses these observations stays in the list and says why.
    """
    comparisons = []
    for form in forms:
        try:
            fitted = fit(form, observations, options)
            if fitted.certificate.unidentified:
                require_identified(fitted)
            if by == GROUPS:
                held_out = leave_one_group_out(form, observations, options)
            else:
                held_out = hold_out_largest(form, observations, by, options)
        except UserError as error:
            number = len(form.parameters)
            comparisons.append(Comparison(form, number, None, None, float("inf"), str(error)))
            continue
        if form.residual == "linear":
            errors = fitted.residuals()
        else:
            errors = fitted.predict(observations) / observations[form.target.name] - 1.0
        in_sample = float(np.abs(errors).mean())
        comparisons.append(Comparison(form, len(form.parameters), fitted, held_out, in_sample))
    return sorted(comparisons, key=lambda comparison: comparison.error)
