"""Comparison of forms by their predictions of held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import Fit, FitOptions, fit, require_identified
from allometry.laws.fit.validate import HeldOut, hold_out_largest, leave_one_group_out
from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

GROUPS = "group"
"""Value of ``by`` that leaves one group out, instead of the largest values of a column."""


OTHER: dict[str, Literal["huber", "square"]] = {"huber": "square", "square": "huber"}


@dataclass(frozen=True)
class Comparison:
    """One form's fit to all rows, and its error on held-out rows.

    ``in_sample``: mean size of the relative errors on the fitted rows. ``other``: held-out rows
    predicted by the fit with the other objective (Huber's for square, square for Huber's).
    ``fragile``: reasons to distrust the optimum. ``problem``: the reason why the form could not be
    fitted or held out; the other fields are then None or infinite.
    """

    form: Form
    parameters: int
    fit: Fit | None
    held_out: HeldOut | None
    in_sample: float
    problem: str | None = None
    other: HeldOut | None = None
    fragile: tuple[str, ...] = ()

    @property
    def error(self) -> float:
        """Mean held-out error, infinite without held-out rows."""
        return self.held_out.mean if self.held_out is not None else float("inf")


def compare(
    forms: Sequence[Form],
    observations: Observations,
    options: FitOptions | None = None,
    by: str = GROUPS,
) -> list[Comparison]:
    """Return the forms by increasing mean held-out error, then fragile, then failed forms.

    ``by``: ``"group"`` leaves out each group in turn, a column's name its largest value. A form
    that cannot be fitted to these observations is listed with the reason. For example,
    ``compare([form_named("chinchilla"), form_named("kappa")], rows)[0].form.name``.
    """
    options = options or FitOptions()
    comparisons = []
    for form in forms:
        try:
            fitted = fit(form, observations, options)
            if fitted.unidentified:
                require_identified(fitted)
            held_out = _hold_out(form, observations, by, options)
        except UserError as error:
            number = len(form.parameters)
            comparisons.append(Comparison(form, number, None, None, float("inf"), str(error)))
            continue
        if form.residual == "linear":
            errors = fitted.residuals()
        else:
            errors = fitted.predict(observations) / observations[form.target.name] - 1.0
        try:
            other = _hold_out(form, observations, by, replace(options, loss=OTHER[options.loss]))
        except UserError:
            other = None
        comparisons.append(
            Comparison(
                form,
                len(form.parameters),
                fitted,
                held_out,
                float(np.abs(errors).mean()),
                other=other,
                fragile=_faults(fitted, held_out),
            )
        )
    return sorted(comparisons, key=lambda one: (bool(one.fragile), one.error))


def _hold_out(form: Form, observations: Observations, by: str, options: FitOptions) -> HeldOut:
    if by == GROUPS:
        return leave_one_group_out(form, observations, options)
    return hold_out_largest(form, observations, by, options)


def _faults(fitted: Fit, held_out: HeldOut) -> tuple[str, ...]:
    """Return reasons why a fit, or the fit without the held-out rows, is fragile."""
    reasons = []
    folds = [
        ("", fitted),
        *([("without the held-out rows ", held_out.fold)] if held_out.fold else []),
    ]
    for which, one in folds:
        certificate = one.certificate
        if one.unidentified:
            reasons.append(f"{which}the data cannot identify {', '.join(one.unidentified)}")
        if certificate.agreeing < 2 <= certificate.finished:
            reasons.append(f"{which}only one of {certificate.finished} starts came to its optimum")
    moved = [name for name in held_out.at_bounds if name not in fitted.certificate.at_bounds]
    if moved:
        reasons.append(f"without the held-out rows {', '.join(moved)} goes to a bound")
    return tuple(reasons)
