"""Farseer's law: the dependence of the loss on tokens changes with the number of parameters."""

# S parameter sets, n rows

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Slopes, Values, Variable
from allometry.laws.forms.dense import D
from allometry.laws.observations import Observations

REFERENCE = 1e9
"""The N at which levels and slopes are defined."""


class Farseer(Form):
    """L = exp(a3·N^γ + b3) + exp(a2·N^β + b2) · D^(-exp(a1·N^α + b1)).

    Three functions of N: the loss for unlimited data, the coefficient of the power of D and its
    exponent. The paper's a and b are not identified as an exponent approaches 0, so the parameters
    of a fit are the logs' values at N = 1e9 (``endless``, ``coefficient``, ``exponent``), their
    slopes by ln N at this N, and the growth of these with N: a·N^γ + b = level + slope·((N/1e9)^γ -
    1)/γ. ``restated`` returns the paper's coefficients. N counts non-embedding parameters.
    """

    name = "farseer"
    equation = "loss = exp(a3*N^gamma+b3) + exp(a2*N^beta+b2) * D^-exp(a1*N^alpha+b1)"
    source = "Farseer, arXiv 2506.10972"
    inputs = (Variable("N", "parameters", "non-embedding parameters"), D)
    target = Variable("loss", "nats per token", "loss of the finished run")
    parameters = (
        Parameter("endless", "ln of the loss's unit", -10.0, 10.0, (-1.0, 1.5)),
        Parameter("endless_slope", "1", -3.0, 3.0, (-0.3, 0.0)),
        Parameter("gamma", "1", -1.0, 1.0, (-0.5, 0.5)),
        Parameter("coefficient", "ln of the loss's unit", -30.0, 100.0, (0.0, 15.0)),
        Parameter("coefficient_slope", "1", -10.0, 10.0, (-1.0, 1.0)),
        Parameter("beta", "1", -1.0, 1.0, (-0.5, 0.5)),
        Parameter("exponent", "1", -6.0, 2.0, (-2.5, 0.0)),
        Parameter("exponent_slope", "1", -3.0, 3.0, (-0.2, 0.2)),
        Parameter("alpha", "1", -1.0, 1.0, (-0.5, 0.5)),
    )
    valid = "the paper: English text, bits per character, predictions up to 25B parameters"

    def prepare(self, observations: Observations) -> Any:
        """Return ln(N/1e9) and ln D [n]."""
        columns = super().prepare(observations)
        return np.log(columns["N"] / REFERENCE), np.log(columns["D"])

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_d = prepared
        endless = values["endless"] + values["endless_slope"] * stretched(values["gamma"], log_n)
        slope = values["coefficient_slope"] * stretched(values["beta"], log_n)
        coefficient = values["coefficient"] + slope
        exponent = values["exponent"] + values["exponent_slope"] * stretched(values["alpha"], log_n)
        return np.asarray(np.exp(endless) + np.exp(coefficient - np.exp(exponent) * log_d))

    def restated(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the paper's a1, α, b1, a2, β, b2, a3, γ, b3 (infinite where a power is 0)."""
        coefficients = {}
        for level, a, power, b in NAMES:
            with np.errstate(divide="ignore", invalid="ignore"):
                reach = np.divide(values[f"{level}_slope"], values[power])
            coefficients[a] = float(reach * REFERENCE ** -values[power])
            coefficients[power] = values[power]
            coefficients[b] = float(values[level] - reach)
        return coefficients

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return the loss [S, n] and its derivatives [S, 9, n]."""
        log_n, log_d = prepared
        shapes, logs = [], []
        for level, _, power, _ in NAMES:
            shape = stretched(values[power], log_n)
            shapes.append((shape, stretched_slope(values[power], log_n, shape)))
            logs.append(values[level] + values[f"{level}_slope"] * shape)
        decline = -np.exp(logs[2]) * log_d
        endless, part = np.exp(logs[0]), np.exp(logs[1] + decline)
        slopes = np.empty((endless.shape[0], 9, endless.shape[1]))
        for index, outer in enumerate((endless, part, part * decline)):
            slope = values[f"{NAMES[index][0]}_slope"]
            slopes[:, 3 * index] = outer
            slopes[:, 3 * index + 1] = outer * shapes[index][0]
            slopes[:, 3 * index + 2] = outer * slope * shapes[index][1]
        return endless + part, slopes


def stretched(power: Any, log_n: Any) -> Any:
    """Return (exp(power·log_n) - 1)/power, log_n where power is 0; valid for complex values."""
    z = power * log_n
    small = np.abs(z) < 1e-5
    ratio = np.expm1(z) / np.where(small, 1.0, z)
    return log_n * np.where(small, 1.0 + z / 2.0 + z * z / 6.0, ratio)


def stretched_slope(power: Any, log_n: Any, value: Any) -> Any:
    """Return the derivative by power of ``stretched``, given its ``value``."""
    z = power * log_n
    small = np.abs(z) < 1e-3
    series = log_n * log_n * (0.5 + z * (1.0 / 3.0 + z * (0.125 + z / 30.0)))
    return np.where(small, series, (log_n * np.exp(z) - value) / np.where(small, 1.0, power))


NAMES = (
    ("endless", "a3", "gamma", "b3"),
    ("coefficient", "a2", "beta", "b2"),
    ("exponent", "a1", "alpha", "b1"),
)


FORMS: tuple[Form, ...] = (Farseer(),)
