"""Laws of the batch size: critical batch against loss, and steps against tokens."""

# S parameter sets, n rows; B tokens of a step, S steps, L nats per token

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.scaling.hyperlaws import minicpm_batch


class CriticalBatch(Form):
    """B_crit(L) = B_star / L^{1/α_B}: the batch up to which a larger batch saves steps.

    The best batch at a loss follows the same form, with other coefficients.
    """

    name = "critical_batch"
    equation = "batch = B_star / loss^(1/alpha_B)"
    source = "Kaplan et al., arXiv 2001.08361, equation 1.4; MiniCPM, arXiv 2404.06395"
    inputs = (Variable("loss", "nats per token", "the loss that is reached"),)
    target = Variable("batch", "tokens", "critical (or best) batch of a step")
    parameters = (
        Parameter("B_star", "tokens", 1.0, 1e15, (1e5, 1e11), "log", linear=True),
        Parameter("alpha_B", "1", 0.01, 10.0, (0.05, 1.0), "log"),
    )
    valid = "losses of 2.5 to 6 nats; data, tokeniser and optimizer change it"
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        # From memory, and not verified by a test.
        "kaplan": {"B_star": 2e8, "alpha_B": 0.21},
        "minicpm": {
            "B_star": minicpm_batch(1.0),
            "alpha_B": 1.0 / math.log(minicpm_batch(1.0) / minicpm_batch(math.e)),
        },
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the batch [S, n]; valid for complex values."""
        return np.asarray(values["B_star"] * np.exp(-np.log(prepared["loss"]) / values["alpha_B"]))


class StepsToLoss(Form):
    """S(B) = S_min + E_min / B: steps to one loss with batches of B tokens.

    The same as (S/S_min − 1)(E/E_min − 1) = 1 with E = B S tokens. S_min is the minimum of steps
    over all batches, E_min the minimum of tokens; B_crit = E_min / S_min takes twice both.
    """

    name = "steps_to_loss"
    equation = "S = S_min + E_min / B, that is (S/S_min - 1)(E/E_min - 1) = 1 with E = B S"
    source = "McCandlish et al., arXiv 1812.06162; Kaplan et al., arXiv 2001.08361"
    inputs = (Variable("B", "tokens", "tokens of a step"),)
    target = Variable("S", "steps", "steps until the loss is reached")
    parameters = (
        Parameter("S_min", "steps", 1e-3, 1e12, (1.0, 1e6), "log", linear=True),
        Parameter("E_min", "tokens", 1e-3, 1e18, (1e3, 1e12), "log", linear=True),
    )
    valid = "runs to one loss, each at the best rate of its batch"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the steps [S, n]; valid for complex values."""
        return np.asarray(values["S_min"] + values["E_min"] / prepared["B"])


FORMS: tuple[Form, ...] = (CriticalBatch(), StepsToLoss())
