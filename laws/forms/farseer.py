"""Farseer: a loss whose dependence on tokens changes with the number of parameters."""

# S parameter sets, n rows

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.laws.forms.dense import D
from allometry.laws.observations import Observations


class Farseer(Form):
    """L = exp(a3·N^γ + b3) + exp(a2·N^β + b2) · D^(-exp(a1·N^α + b1)).

    Three stretched exponentials of N: the loss without end of data, the coefficient of the power
    of D and its exponent. N counts non-embedding parameters. Bounds are wider than those of
    public code of the paper, so that losses in nats per token fit as well as bits per character.
    """

    # From memory, never compared with the paper, so no published set: a1 -.124, α .123, b1 .424,
    # a2 88.01, β -.1, b2 -6.287, a3 -.021, γ .169, b3 -.091.
    name = "farseer"
    equation = "loss = exp(a3*N^gamma+b3) + exp(a2*N^beta+b2) * D^-exp(a1*N^alpha+b1)"
    source = "Farseer, arXiv 2506.10972"
    inputs = (Variable("N", "parameters", "non-embedding parameters"), D)
    target = Variable("loss", "nats per token or bits per character", "loss of the finished run")
    parameters = (
        Parameter("a1", "1", -10.0, 10.0, (-1.0, 0.0)),
        Parameter("alpha", "1", 0.0, 1.0, (0.0, 0.5)),
        Parameter("b1", "1", -10.0, 10.0, (-2.0, 1.0)),
        Parameter("a2", "1", 0.0, 1000.0, (0.1, 200.0), "log"),
        Parameter("beta", "1", -1.0, 0.0, (-0.5, 0.0)),
        Parameter("b2", "1", -100.0, 100.0, (-10.0, 10.0)),
        Parameter("a3", "1", -10.0, 10.0, (-1.0, 0.0)),
        Parameter("gamma", "1", 0.0, 1.0, (0.0, 0.5)),
        Parameter("b3", "1", -10.0, 10.0, (-1.0, 2.0)),
    )
    valid = "the paper: English text, 0.2B to 6.4B parameters fitted, 25B predicted"

    def prepare(self, observations: Observations) -> Any:
        """Return ln N and ln D [n]."""
        columns = super().prepare(observations)
        return np.log(columns["N"]), np.log(columns["D"])

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_d = prepared
        exponent = np.exp(values["a1"] * np.exp(values["alpha"] * log_n) + values["b1"])
        log_coefficient = values["a2"] * np.exp(values["beta"] * log_n) + values["b2"]
        endless = np.exp(values["a3"] * np.exp(values["gamma"] * log_n) + values["b3"])
        return np.asarray(endless + np.exp(log_coefficient - exponent * log_d))


FORMS: tuple[Form, ...] = (Farseer(),)
