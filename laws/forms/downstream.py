"""From loss to what a benchmark says: error and accuracy."""

# S parameter sets, n rows

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable


class DownstreamError(Form):
    """Err(L) = ε − k exp(−γ L): the mean error over tasks falls as the loss does.

    Meant for a mean over many tasks that start above chance; single tasks are noisy and may not
    move at all at small scales.
    """

    name = "downstream_error"
    equation = "error = epsilon - k exp(-gamma loss)"
    source = "Gadre et al., arXiv 2403.08540"
    inputs = (Variable("loss", "nats per token", "loss on the evaluation set"),)
    target = Variable("error", "fraction", "1 - accuracy, averaged over tasks")
    parameters = (
        Parameter("epsilon", "fraction", 0.0, 2.0, (0.1, 1.0), linear=True),
        Parameter("k", "fraction", 1e-9, 1e9, (0.01, 1e3), "log", linear=True),
        Parameter("gamma", "tokens per nat", 1e-3, 50.0, (0.05, 5.0), "log"),
    )
    valid = "losses of 2.4 to 6 nats on C4's validation set, 17 or 46 tasks averaged"
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the error [S, n]; holds for complex values."""
        fallen = values["k"] * np.exp(-values["gamma"] * prepared["loss"])
        return np.asarray(values["epsilon"] - fallen)


class DownstreamSigmoid(Form):
    """Acc(L) = a / (1 + exp(−k (L − L0))) + b: chance at high loss, saturation at low loss.

    The second of two steps: the first predicts the task's own loss (of the right answers, in bits
    for each byte) from N and D. a is negative: b is what a perfect model gets, a + b what chance
    gives. Fit it to intermediate checkpoints, averaged as ``laws.downstream.smooth_checkpoints``
    does.
    """

    name = "downstream_sigmoid"
    equation = "accuracy = a / (1 + exp(-k (loss - L0))) + b"
    source = "Bhagia et al. (OLMo ladder), arXiv 2412.04403"
    inputs = (Variable("loss", "bits per byte", "loss of the task's right answers"),)
    target = Variable("accuracy", "fraction", "accuracy on the task")
    parameters = (
        Parameter("a", "fraction", -2.0, 0.0, (-1.0, -0.05), linear=True),
        Parameter("k", "bytes per bit", 0.01, 1e3, (0.5, 50.0), "log"),
        Parameter("L0", "bits per byte", -20.0, 20.0, (0.1, 5.0)),
        Parameter("b", "fraction", -1.0, 2.0, (0.2, 1.0), linear=True),
    )
    valid = "multiple-choice tasks, models of 190M to 13B parameters"
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the accuracy [S, n]; holds for complex values and far into both tails."""
        argument = values["k"] * (prepared["loss"] - values["L0"])
        # 1/(1 + exp(-x)) without the overflow.
        step = 0.5 * (1.0 + np.tanh(0.5 * argument))
        return np.asarray(values["a"] * step + values["b"])


FORMS: tuple[Form, ...] = (DownstreamError(), DownstreamSigmoid())
