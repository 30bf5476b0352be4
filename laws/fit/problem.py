"""Residuals of a form on its rows, in the coordinates of a search."""

# S parameter sets, n rows, P free parameters; x search coordinates, v values of parameters

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.forms.base import Form, Parameter
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

LARGEST_LOG = 690.0
"""Logs of parameters are kept within +-690, where exp neither overflows nor underflows."""
COMPLEX_STEP = 1e-30
CHUNK = 2**13
"""Number of residuals computed at once: few enough to stay in a core's cache."""


class Problem:
    """Residuals of a form on observations as functions of its free parameters.

    Search coordinates: the natural log of a parameter of log scale, else its value. ``fixed``
    parameters keep their values and are not among the P coordinates. Raises UserError: the target
    is missing, not finite, or not positive for residuals of logs; a fixed parameter is unknown, or
    all parameters are fixed.
    """

    def __init__(
        self, form: Form, observations: Observations, fixed: Mapping[str, float] | None = None
    ) -> None:
        self.form = form
        self.fixed = dict(fixed or {})
        names = [parameter.name for parameter in form.parameters]
        for name in self.fixed:
            if name not in names:
                raise UserError(
                    f"{form.name} has no parameter {name!r} to fix; it has {', '.join(names)}"
                )
        self.columns = [i for i, p in enumerate(form.parameters) if p.name not in self.fixed]
        self.free = tuple(form.parameters[i] for i in self.columns)
        if not self.free:
            raise UserError(f"every parameter of {form.name} is fixed; leave at least one to fit")
        self.prepared = form.prepare(observations)
        self.logs = form.residual == "log"
        target_n = checked_target(form, observations)
        self.target_n = np.log(target_n) if self.logs else target_n
        self.log_P = np.array([p.scale == "log" for p in self.free])
        self.low_P = np.array([search_coordinate(p, p.low) for p in self.free])
        self.high_P = np.array([search_coordinate(p, p.high) for p in self.free])

    def values(self, x_SP: Array) -> dict[str, Any]:
        """Return each parameter's values [S, 1], and fixed ones as floats."""
        v_SP = self.values_array(x_SP)
        return {**self.fixed, **{p.name: v_SP[:, i, None] for i, p in enumerate(self.free)}}

    def values_at(self, x_P: Array) -> dict[str, float]:
        """Return each parameter's value, in the form's order."""
        free = {p.name: float(v) for p, v in zip(self.free, self.values_array(x_P), strict=True)}
        return {p.name: {**self.fixed, **free}[p.name] for p in self.form.parameters}

    def values_array(self, x_SP: Array) -> Array:
        """Return the values [S, P] of search coordinates."""
        return np.where(self.log_P, np.exp(np.where(self.log_P, x_SP, 0.0)), x_SP)

    def coordinates(self, values: Mapping[str, float]) -> Array:
        """Return the search coordinates [P] of values."""
        return np.array([search_coordinate(p, values[p.name]) for p in self.free])

    def residuals(self, x_SP: Array) -> Array:
        """Return the residuals [S, n]: NaN where undefined (log of a non-positive number)."""
        with np.errstate(all="ignore"):
            predicted = self._predictions(self.values(x_SP))
            return self.residual(np.broadcast_to(predicted, (len(x_SP), len(self.target_n))))

    def slopes(self, x_SP: Array) -> tuple[Array, Array]:
        """Return residuals [S, n] and their derivatives [S, P, n] by search coordinate."""
        with np.errstate(all="ignore"):
            predicted_Sn, J_SPn, stretch_SP = self.raw_slopes(x_SP)
            if self.logs:
                J_SPn = J_SPn / predicted_Sn[:, None, :]
            return self.residual(predicted_Sn), J_SPn * stretch_SP[:, :, None]

    def raw_slopes(self, x_SP: Array) -> tuple[Array, Array, Array]:
        """Return predictions [S, n], their derivatives by value [S, P, n], and dv/dx [S, P]."""
        values = self.values(x_SP)
        whole = {name: np.full((len(x_SP), 1), value) for name, value in self.fixed.items()}
        given = self.form.derivatives({**values, **whole}, self.prepared)
        if given is None:
            predicted_Sn, J_SPn = self._complex_steps(values, len(x_SP))
        else:
            predicted_Sn, J_SPn = given
            if self.fixed:
                J_SPn = J_SPn[:, self.columns]
        stretch_SP = np.where(self.log_P, self.values_array(x_SP), 1.0)
        return predicted_Sn, J_SPn, stretch_SP

    def residual(self, predicted_Sn: Array) -> Array:
        """Return predicted minus measured, or the same of logs: NaN where a log is undefined."""
        if self.logs:
            return np.log(predicted_Sn) - self.target_n
        return predicted_Sn - self.target_n

    def _predictions(self, values: Mapping[str, Any]) -> Any:
        predicted = self.form.predict(values, self.prepared)
        assert predicted.shape[-1] == len(self.target_n), (self.form.name, predicted.shape)
        return predicted

    def _complex_steps(self, values: Mapping[str, Any], number: int) -> tuple[Array, Array]:
        shape = (number, len(self.target_n))
        J_SPn = np.empty((number, len(self.free), len(self.target_n)))
        for index, parameter in enumerate(self.free):
            step = COMPLEX_STEP * np.maximum(np.abs(values[parameter.name]), COMPLEX_STEP)
            moved = {**values, parameter.name: values[parameter.name] + 1j * step}
            predicted_Sn = np.broadcast_to(self._predictions(moved), shape)
            np.divide(predicted_Sn.imag, step, out=J_SPn[:, index])
        return np.array(predicted_Sn.real), J_SPn


def checked_target(form: Form, observations: Observations) -> Array:
    """Return the target column. Raises UserError: a value cannot be fitted."""
    target_n = observations[form.target.name]
    target, logs = form.target, form.residual == "log"
    bad = ~np.isfinite(target_n) | ((target_n <= 0.0) if logs else False)
    bad |= (target_n < target.least) | (target_n > target.most)
    if bad.any():
        row = int(np.argmax(bad))
        bounded = np.isfinite((target.least, target.most)).any()
        demand = target.demand if bounded else "positive numbers" if logs else "numbers"
        raise UserError(
            f"{target.name} of {observations.place(row)} is {target_n[row]}, and "
            f"{form.name} is fitted to {demand}; mend or drop the row{target.hint(target_n)}"
        )
    return target_n


def search_coordinate(parameter: Parameter, value: float) -> float:
    """Return the search coordinate of this value of a parameter."""
    if parameter.scale == "linear":
        return float(value)
    with np.errstate(divide="ignore"):
        return float(np.clip(np.log(value), -LARGEST_LOG, LARGEST_LOG))
