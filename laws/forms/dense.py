"""Laws of the loss of dense models from parameters and tokens."""

# S parameter sets, n rows

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import (
    Form,
    LogForm,
    Parameter,
    Predictions,
    Slopes,
    Values,
    Variable,
)

N = Variable("N", "parameters", "parameters of the model, as the observations' convention counts")
D = Variable("D", "tokens", "training tokens")
LOSS = Variable("loss", "nats per token", "loss of the finished run")


def _exps(low: float, high: float, step: float) -> tuple[float, ...]:
    """Return exp of an even grid, both ends included."""
    return tuple(float(np.exp(x)) for x in np.arange(low, high + step / 2, step))


class Chinchilla(LogForm):
    """L = E + A/N^α + B/D^β, the third approach of Hoffmann et al.

    The grid of starts has the 4,500 points of Besiroglu et al.: ln A, ln B in {0, 5, ..., 25}, ln E
    in {-1, ..., 1}, α, β in {0, ..., 2}.
    """

    name = "chinchilla"
    equation = "loss = E + A/N^alpha + B/D^beta"
    source = "Hoffmann et al., arXiv 2203.15556, equation 10; Besiroglu et al., arXiv 2404.10102"
    inputs = (N, D)
    target = LOSS
    parameters = (
        Parameter("E", "nats per token", 0.0, np.inf, (0.3, 4.0), "log", _exps(-1, 1, 0.5), True),
        Parameter("A", "nats per token", 0.0, np.inf, (1.0, 1e11), "log", _exps(0, 25, 5), True),
        Parameter("B", "nats per token", 0.0, np.inf, (1.0, 1e11), "log", _exps(0, 25, 5), True),
        Parameter("alpha", "1", 0.0, 4.0, (0.0, 2.0), grid=(0.0, 0.5, 1.0, 1.5, 2.0)),
        Parameter("beta", "1", 0.0, 4.0, (0.0, 2.0), grid=(0.0, 0.5, 1.0, 1.5, 2.0)),
    )
    valid = "decoder-only text models, 44M to 16B parameters, 0.3B to 600B tokens"
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "hoffmann": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
        # As in the paper's TeX, before rounding.
        "hoffmann_unrounded": {
            "E": math.exp(0.5267228),
            "A": math.exp(6.0073404),
            "B": math.exp(6.0179186),
            "alpha": 0.33917,
            "beta": 0.28491,
        },
        "besiroglu": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_d = prepared
        return np.asarray(
            values["E"]
            + values["A"] * np.exp(-values["alpha"] * log_n)
            + values["B"] * np.exp(-values["beta"] * log_d)
        )

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return the loss [S, n] and its derivatives [S, 5, n]; the exponentials are shared."""
        log_n, log_d = prepared
        power_n, power_d = np.exp(-values["alpha"] * log_n), np.exp(-values["beta"] * log_d)
        part_n, part_d = values["A"] * power_n, values["B"] * power_d
        slopes = np.empty((power_n.shape[0], 5, power_n.shape[1]))
        slopes[:, 0] = 1.0
        slopes[:, 1] = power_n
        slopes[:, 2] = power_d
        np.multiply(part_n, -log_n, out=slopes[:, 3])
        np.multiply(part_d, -log_d, out=slopes[:, 4])
        return values["E"] + part_n + part_d, slopes


class Kappa(LogForm):
    """L = E + (A/N^a + B/D^b)^κ: Chinchilla's law with one more parameter; κ = 1 is Chinchilla.

    The alternative to Farseer's nine parameters: with κ < 1 the loss is smaller than the sum of two
    separate terms if both N and D are small.
    """

    name = "kappa"
    equation = "loss = E + (A/N^a + B/D^b)^kappa"
    source = "a generalisation of Hoffmann et al., arXiv 2203.15556; cf. Kaplan's equation 1.5"
    inputs = (N, D)
    target = LOSS
    parameters = (
        Parameter("E", "nats per token", 0.0, np.inf, (0.3, 4.0), "log", linear=True),
        Parameter("A", "(nats per token)^(1/kappa)", 0.0, np.inf, (1.0, 1e6), "log"),
        Parameter("B", "(nats per token)^(1/kappa)", 0.0, np.inf, (1.0, 1e6), "log"),
        Parameter("a", "1", 0.0, 8.0, (0.05, 1.0)),
        Parameter("b", "1", 0.0, 8.0, (0.05, 1.0)),
        Parameter("kappa", "1", 0.01, 100.0, (0.2, 5.0), "log"),
    )
    valid = "as Chinchilla's; needs N and D that vary apart"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_n, log_d = prepared
        part_n = values["A"] * np.exp(-values["a"] * log_n)
        part_d = values["B"] * np.exp(-values["b"] * log_d)
        return np.asarray(values["E"] + np.exp(values["kappa"] * np.log(part_n + part_d)))

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return the loss [S, n] and its derivatives [S, 6, n]."""
        log_n, log_d = prepared
        power_n, power_d = np.exp(-values["a"] * log_n), np.exp(-values["b"] * log_d)
        both = values["A"] * power_n + values["B"] * power_d
        log_both = np.log(both)
        reducible = np.exp(values["kappa"] * log_both)
        chain = values["kappa"] * reducible / both
        slopes = np.empty((power_n.shape[0], 6, power_n.shape[1]))
        slopes[:, 0] = 1.0
        np.multiply(chain, power_n, out=slopes[:, 1])
        np.multiply(chain, power_d, out=slopes[:, 2])
        slopes[:, 3] = slopes[:, 1] * (-values["A"] * log_n)
        slopes[:, 4] = slopes[:, 2] * (-values["B"] * log_d)
        np.multiply(reducible, log_both, out=slopes[:, 5])
        return values["E"] + reducible, slopes


FORMS: tuple[Form, ...] = (Chinchilla(), Kappa())
