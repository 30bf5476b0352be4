"""Laws of the loss by the shape of a model: width and depth, with parameters and tokens."""

# S parameter sets, n rows

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, LogForm, Parameter, Predictions, Values, Variable
from allometry.laws.forms.dense import LOSS, D, N

WIDTH = Variable("width", "1", "width of the residual stream, model.width")
LAYERS = Variable("layers", "1", "number of blocks, model.num_layers")


class AspectRatio(LogForm):
    """L = (E + A/N^α + B/D^β) (1 + ε (width/layers)^γ): Chinchilla's law with the model's shape.

    With a positive γ wider and shallower models are worse at equal N and D, with a negative γ
    better; there is no best ratio in between. Runs must vary in their shape at equal N: if the
    ratio is a function of N, ε is not identified separately from A.
    """

    name = "aspect_ratio"
    equation = "loss = (E + A/N^alpha + B/D^beta) (1 + eps (width/layers)^gamma)"
    source = "Bian et al., arXiv 2501.18107 (inference-efficient law), from memory"
    inputs = (N, D, WIDTH, LAYERS)
    target = LOSS
    parameters = (
        Parameter("E", "nats per token", 0.0, np.inf, (0.3, 4.0), "log", linear=True),
        Parameter("A", "nats per token", 0.0, np.inf, (1.0, 1e6), "log", linear=True),
        Parameter("B", "nats per token", 0.0, np.inf, (1.0, 1e6), "log", linear=True),
        Parameter("alpha", "1", 0.0, 4.0, (0.05, 1.0)),
        Parameter("beta", "1", 0.0, 4.0, (0.05, 1.0)),
        Parameter("eps", "1", 1e-12, 1e3, (1e-5, 0.3), "log"),
        Parameter("gamma", "1", -4.0, 4.0, (-1.5, 1.5)),
    )
    valid: ClassVar[str] = "the paper: 63 models of 80M to 1B parameters, 1.6B to 30B tokens"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        log_n, log_d, log_width, log_layers = prepared
        dense = values["E"] + values["A"] * np.exp(-values["alpha"] * log_n)
        dense = dense + values["B"] * np.exp(-values["beta"] * log_d)
        shape = values["eps"] * np.exp(values["gamma"] * (log_width - log_layers))
        return np.asarray(dense * (1.0 + shape))


class WidthDepth(LogForm):
    """L = E + A/width^α + G/layers^γ + B/D^β: width and depth have separate terms.

    The paper finds γ near 1. With N = 12 width² layers the law has a best ratio of width to depth
    at each N (``restated``). Runs must vary in width and depth independently.
    """

    name = "width_depth"
    equation = "loss = E + A/width^alpha + G/layers^gamma + B/D^beta"
    source = "Liu et al., arXiv 2602.05970 (width m, depth l), from memory"
    inputs = (WIDTH, LAYERS, D)
    target = LOSS
    parameters = (
        Parameter("E", "nats per token", 0.0, np.inf, (0.3, 4.0), "log", linear=True),
        Parameter("A", "nats per token", 0.0, np.inf, (0.1, 1e5), "log", linear=True),
        Parameter("G", "nats per token", 0.0, np.inf, (0.01, 1e2), "log", linear=True),
        Parameter("B", "nats per token", 0.0, np.inf, (1.0, 1e6), "log", linear=True),
        Parameter("alpha", "1", 0.0, 4.0, (0.1, 2.0)),
        Parameter("gamma", "1", 0.0, 4.0, (0.1, 2.0)),
        Parameter("beta", "1", 0.0, 4.0, (0.05, 1.0)),
    )
    valid: ClassVar[str] = "dense models; the paper finds gamma near 1"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        log_width, log_layers, log_d = prepared
        width = values["A"] * np.exp(-values["alpha"] * log_width)
        depth = values["G"] * np.exp(-values["gamma"] * log_layers)
        return np.asarray(
            values["E"] + width + depth + values["B"] * np.exp(-values["beta"] * log_d)
        )

    def restated(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the width at the best shape of N = 12 width² layers, c N^p: its c and p.

        With layers = N/(12 width²) the loss is least where α A width^-α = 2 γ G (N/12)^-γ
        width^(2γ); {} if a term has no slope.
        """
        alpha, gamma = values["alpha"], values["gamma"]
        if min(alpha * values["A"], gamma * values["G"]) <= 0.0:
            return {}
        power = 1.0 / (alpha + 2.0 * gamma)
        ratio = alpha * values["A"] / (2.0 * gamma * values["G"])
        return {
            "best width coefficient": float(ratio**power * 12.0 ** (-gamma * power)),
            "best width exponent of N": float(gamma * power),
        }


FORMS: tuple[Form, ...] = (AspectRatio(), WidthDepth())
