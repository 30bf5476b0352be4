"""Fit of a law: all starts in one batch, the best optimum, and its certificate."""

# S starts, n rows, P free parameters

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.certificate import NULL, Certificate, certify
from allometry.laws.fit.plain import observations_from_json, observations_to_json, plain_number
from allometry.laws.fit.problem import Problem
from allometry.laws.fit.solver import Loss, Solved, minimize
from allometry.laws.fit.starts import project, starts_of
from allometry.laws.forms.base import LOSS_UNIT, Form
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

Array = NDArray[np.float64]

DATA_UNIT = "unit of the data"
POLISHED = 1e-10
"""Relative gain of the next step below which a search has converged."""
LONG = 3000
"""Iterations of the best search if the default number was too small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """Options of a fit.

    ``loss``: Huber's (½r² inside of ``delta``) or the plain square ½r², SUMMED over rows, of the
    form's residuals. ``starts``: None for the form's grid (256 spread points if the form has none).
    ``seed``: of spread points. ``fixed``: values of parameters that are not fitted. ``projection``:
    True to solve for linear parameters of starts first. ``survivors``: number of starts that
    successive halving keeps to the end (None: all).
    """

    loss: Literal["huber", "square"] = "huber"
    delta: float = 1e-3
    starts: int | None = None
    seed: int = 0
    fixed: Mapping[str, float] = field(default_factory=dict)
    projection: bool = True
    survivors: int | None = 64

    def __post_init__(self) -> None:
        if self.loss not in ("huber", "square"):
            raise UserError(f"loss={self.loss!r} is none of a fit's; use huber or square")
        if not (np.isfinite(self.delta) and self.delta > 0.0):
            raise UserError(f"delta={self.delta} must be a positive number; 0.001 is usual")
        if self.starts is not None and self.starts < 1:
            raise UserError(f"starts={self.starts} must be at least 1; leave it out for the grid")
        if self.survivors is not None and self.survivors < 1:
            raise UserError(
                f"survivors={self.survivors} must be at least 1; None keeps every search"
            )

    def make_loss(self) -> Loss:
        """Return the loss of these options."""
        return Loss(self.delta if self.loss == "huber" else None)


@dataclass(frozen=True)
class Fit:
    """A form with fitted (or given) values, and the fitted observations.

    ``objective``: the sum over rows of the loss.
    """

    form: Form
    values: dict[str, float]
    objective: float
    certificate: Certificate
    observations: Observations
    options: FitOptions

    def predict(self, observations: Observations) -> Array:
        """Return the target [n] of these rows."""
        return predict(self.form, self.values, observations)

    def residuals(self) -> Array:
        """Return the residuals [n] of the fitted rows, on the form's scale (logs by default)."""
        problem = self.problem()
        return np.asarray(problem.residuals(problem.coordinates(self.values)[None])[0])

    @property
    def vanished(self) -> tuple[str, ...]:
        """Constants and coefficients that went to 0, their lower bound.

        Linear parameters that change no fitted row's prediction by more than 1e-7 of it when set to
        0.
        """
        rows, names = self.observations, []
        here_n = predict(self.form, self.values, rows)
        for one in self.form.parameters:
            if one.linear and one.low == 0.0 and one.name not in self.options.fixed:
                without_n = predict(self.form, {**self.values, one.name: 0.0}, rows)
                if (np.abs(without_n - here_n) <= NULL * np.abs(here_n)).all():
                    names.append(one.name)
        return tuple(names)

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Parameters that the data do not identify; empty if all of these have vanished."""
        unidentified = self.certificate.unidentified
        return () if set(unidentified) <= set(self.vanished) else unidentified

    def problem(self) -> Problem:
        """Return the fit's problem, for searches and certificates."""
        return Problem(self.form, self.observations, self.options.fixed)

    def unit(self, unit: str) -> str:
        """Return a unit of the form for these rows.

        Where the form has nats per token, the unit of a fit to a table is the unknown unit of the
        table's losses.
        """
        about = self.observations.conventions
        losses = [v.name for v in (*self.form.inputs, self.form.target) if v.unit == LOSS_UNIT]
        if all(LOSS_UNIT in about[name] for name in losses if name in about):
            return unit
        return unit.replace(LOSS_UNIT, DATA_UNIT)

    def warnings_for(self, observations: Observations) -> list[str]:
        """Return a sentence for each input of these rows outside of the fitted range.

        Rows whose N and D are within their ranges while 6 N D, their compute, is not also give a
        sentence.
        """
        fitted, asked = self.observations, observations
        names = [v.name for v in self.form.inputs if v.name in fitted.columns]
        warnings = [_outside(name, fitted[name], asked[name]) for name in names]
        if "N" in names and "D" in names:
            apart_n = np.ones(len(asked), dtype=bool)
            for name in ("N", "D"):
                apart_n &= (asked[name] >= fitted[name].min()) & (asked[name] <= fitted[name].max())
            both = 6.0 * asked["N"] * asked["D"]
            warnings.append(
                _outside(
                    "6ND",
                    6.0 * fitted["N"] * fitted["D"],
                    both[apart_n],
                    " (N and D by themselves are within theirs)",
                )
            )
        return [warning for some in warnings for warning in some]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ``from_json`` of these gives bit-identical predictions."""
        return {
            "form": self.form.name,
            "values": {name: plain_number(value) for name, value in self.values.items()},
            "objective": plain_number(self.objective),
            "certificate": self.certificate.to_json(),
            "observations": observations_to_json(self.observations),
            "options": asdict(self.options),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the fit of ``to_json``.

        Raises UserError: the law does not exist, or has other parameters now.
        """
        form, names = form_named(data["form"]), list(data["values"])
        if names != [parameter.name for parameter in form.parameters]:
            raise UserError(
                f"{form.name} was fitted with the parameters {', '.join(names)}, and has "
                f"{', '.join(p.name for p in form.parameters)} now; fit again"
            )
        return cls(
            form,
            {name: float(value) for name, value in data["values"].items()},
            float(data["objective"]),
            Certificate.from_json(data["certificate"]),
            observations_from_json(data["observations"]),
            FitOptions(**data["options"]),
        )


def _outside(name: str, fitted: Array, asked: Array, more: str = "") -> list[str]:
    """Return a sentence for each end of the fitted range that the values exceed."""
    warnings = []
    if not len(asked):
        return []
    low, high = float(fitted.min()), float(fitted.max())
    for value, edge, word in ((asked.min(), low, "below"), (asked.max(), high, "above")):
        if value < low if word == "below" else value > high:
            ratio = value / edge if edge > 0.0 and value > 0.0 else None
            times = f" ({max(ratio, 1 / ratio):.3g} times {word})" if ratio else ""
            warnings.append(
                f"{name}={value:.4g} is outside of the fitted range {low:.4g} to {high:.4g}{times}"
                f"{more}: the prediction is an extrapolation"
            )
    return warnings


def predict(form: Form, values: Mapping[str, float], observations: Observations) -> Array:
    """Return the target [n] of these rows by a form with these values, such as published ones.

    For example, ``predict(form, form.published["besiroglu"], rows)``.
    """
    predicted = form.target.clip(form.predict(values, form.prepare(observations)))
    return np.array(np.broadcast_to(predicted, (len(observations),)))


def fit(form: Form, observations: Observations, options: FitOptions | None = None) -> Fit:
    """Return the best of the local optima of all starts, with its certificate.

    Raises UserError: there are fewer distinct rows than parameters; a column is missing or
    unusable; no start gives finite predictions. For example,
    ``fit(form_named("chinchilla"), rows).values["E"]``.
    """
    options = options or FitOptions()
    problem = Problem(form, observations, options.fixed)
    check_enough(problem, observations)
    starts_SP, counts_S = distinct_starts(problem, options)
    solved = minimize(problem, starts_SP, options.make_loss(), survivors=options.survivors)
    best = best_of(form, solved)
    solved = polish(problem, solved, options.make_loss(), best)
    return Fit(
        form,
        problem.values_at(solved.x_SP[best]),
        float(solved.objective_S[best]),
        certify(problem, solved, counts_S),
        observations,
        options,
    )


def distinct_starts(problem: Problem, options: FitOptions) -> tuple[Array, NDArray[np.int64]]:
    """Return the distinct starts [S, P], projected, and the number of starts equal to each [S]."""
    starts_SP = starts_of(problem, options.starts, options.seed)
    if options.projection:
        starts_SP = project(problem, starts_SP)
    unique_SP, counts_S = np.unique(starts_SP, axis=0, return_counts=True)
    return unique_SP, counts_S


def polish(problem: Problem, solved: Solved, loss: Loss, best: int) -> Solved:
    """Return the searches with the best one continued to convergence, if needed."""
    if solved.decrease_S[best] <= POLISHED * solved.objective_S[best]:
        return solved
    again = minimize(problem, solved.x_SP[best][None], loss, max_iterations=LONG)
    arrays = {}
    for part in fields(Solved):
        array = getattr(solved, part.name).copy()
        array[best] = getattr(again, part.name)[0]
        arrays[part.name] = array
    return Solved(**arrays)


def best_of(form: Form, solved: Solved) -> int:
    """Return the search with the least objective. Raises UserError: no objective is finite."""
    best = int(np.argmin(solved.objective_S))
    if not np.isfinite(solved.objective_S[best]):
        raise UserError(
            f"{form.name} predicts nothing that can be compared with {form.target.name} from any "
            f"of {len(solved.objective_S)} starts; check the units of "
            f"{', '.join(variable.name for variable in form.inputs)}"
        )
    return best


def check_enough(problem: Problem, observations: Observations) -> None:
    """Raise a UserError if fewer rows differ in their inputs than parameters are fitted."""
    form = problem.form
    columns = [observations[v.name] for v in form.inputs if v.name in observations.columns]
    if observations.curves:
        columns.append(np.unique(observations.groups, return_inverse=True)[1].astype(np.float64))
        if "step" in observations.columns:
            columns.append(observations["step"])
    distinct = len(np.unique(np.stack(columns, axis=1), axis=0)) if columns else len(observations)
    if distinct < len(problem.free):
        names = ", ".join(variable.name for variable in form.inputs)
        raise UserError(
            f"{form.name} has {len(problem.free)} parameters to fit and the observations only "
            f"{distinct} rows that differ in {names}; add runs or choose a law of fewer parameters"
        )


def require_identified(fit: Fit, held: str = "--fix {name}=0") -> None:
    """Raise unless the data identify every parameter.

    Raises UserError, with the names of parameters that can change without changing a prediction, or
    whose standard errors are as wide as the range of the starts; and with the option, formatted by
    ``held``, that fixes vanished parameters at 0.
    """
    zero = [held.format(name=name) for name in fit.vanished]
    hold = f", or hold what went to 0 there ({' '.join(zero)})" if zero else ""
    for verb, names, why in (
        ("cannot", fit.unidentified, "other values predict the same"),
        ("hardly", fit.certificate.loose, "with their scatter any plausible value fits"),
    ):
        if names:
            inputs = ", ".join(variable.name for variable in fit.form.inputs)
            raise UserError(
                f"the {len(fit.observations)} observations {verb} identify {', '.join(names)} of "
                f"{fit.form.name}: {why}; add runs that differ in more of {inputs} or choose a "
                f"simpler law{hold}"
            )
