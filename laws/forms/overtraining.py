"""Law of over-training: loss from compute and tokens per parameter."""

# S parameter sets, n rows; N parameters, D tokens, M = D/N, C = 6ND FLOPs

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable


class OverTraining(Form):
    """L(C, M) = E + (a M^η + b M^−η) C^−η with M = D/N and C = 6ND.

    Runs of equal M are on parallel lines of reducible loss against compute, so a law of five small
    runs can be extrapolated to a long one. It is Chinchilla's law with one exponent for both terms:
    L = E + a (6N²)^−η + b (6D²)^−η, so α = β = 2η.

    The paper fits plain least squares of the losses themselves, hence ``residual``; use
    ``loss="square"`` to reproduce it. Its code writes α = a 6^−η, β = b and an exponent −2η.
    """

    name = "over_training"
    equation = "loss = E + (a M^eta + b M^-eta) C^-eta, M = D/N, C = 6 N D"
    source = "Gadre et al., arXiv 2403.08540"
    inputs = (
        Variable("N", "parameters", "all parameters, embeddings included"),
        Variable("D", "tokens", "tokens of the run"),
    )
    target = Variable("loss", "nats per token", "loss on the evaluation set")
    parameters = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 4.0), linear=True),
        Parameter("a", "nats per token", 1e-6, 1e12, (1.0, 1e5), "log", linear=True),
        Parameter("b", "nats per token", 1e-6, 1e12, (1.0, 1e5), "log", linear=True),
        Parameter("eta", "1", 0.001, 2.0, (0.02, 0.5)),
    )
    valid = (
        "11M to 6.9B parameters, 5 to 640 tokens for each, at the tuned rates of one recipe; "
        "tokens seen once"
    )
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        ln_6 = np.log(6.0)
        ln_parameters, ln_tokens = np.log(prepared["N"]), np.log(prepared["D"])
        size = values["a"] * np.exp(-values["eta"] * (ln_6 + 2.0 * ln_parameters))
        data = values["b"] * np.exp(-values["eta"] * (ln_6 + 2.0 * ln_tokens))
        return np.asarray(values["E"] + size + data)


FORMS: tuple[Form, ...] = (OverTraining(),)
