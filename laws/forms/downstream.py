"""Laws from the loss to benchmark scores: error and accuracy."""

# S parameter sets, n rows

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable


class DownstreamError(Form):
    """Err(L) = ε − k exp(−γ L): the mean error over tasks falls with the loss.

    Intended for a mean over many tasks above chance; single tasks are noisy and may not change at
    all at small scales. ε, the error at high loss, is at most 1; if the tasks' chance is known, fix
    it with ``fixed={"epsilon": 1 - chance}``.
    """

    name = "downstream_error"
    equation = "error = epsilon - k exp(-gamma loss)"
    source = "Gadre et al., arXiv 2403.08540"
    inputs = (Variable("loss", "nats per token", "loss on the evaluation set"),)
    target = Variable("error", "fraction", "1 - accuracy, averaged over tasks", False, 0.0, 1.0)
    parameters = (
        Parameter("epsilon", "fraction", 0.0, 1.0, (0.1, 1.0), linear=True),
        Parameter("k", "fraction", 1e-9, 1e9, (0.01, 1e3), "log", linear=True),
        Parameter("gamma", "tokens per nat", 1e-3, 50.0, (0.05, 5.0), "log"),
    )
    valid = "losses of 2.4 to 6 nats on C4's validation set, 17 or 46 tasks averaged"
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the error [S, n]; valid for complex values."""
        fallen = values["k"] * np.exp(-values["gamma"] * prepared["loss"])
        return np.asarray(values["epsilon"] - fallen)


class DownstreamSigmoid(Form):
    """Acc(L) = c + (1 − c) g / (1 + exp(k (L − L0))): chance at high loss, more at low loss.

    The second of two steps: the first predicts the task's own loss (of the right answers, in bits
    per byte) from N and D. The paper writes a/(1 + exp(−k (L − L0))) + b, where b = c + (1−c)g is
    the accuracy of a perfect model and a + b = c the chance. Here both are between 0 and 1, and the
    former is never less than the latter, for any data. If chance is known, fix it:
    ``fixed={"chance": 0.25}``. Fit it to intermediate checkpoints, averaged by
    ``laws.downstream.smooth_checkpoints``.
    """

    name = "downstream_sigmoid"
    equation = "accuracy = chance + (1 - chance) gain / (1 + exp(k (loss - L0)))"
    source = "Bhagia et al. (OLMo ladder), arXiv 2412.04403"
    inputs = (Variable("loss", "bits per byte", "loss of the task's right answers"),)
    target = Variable("accuracy", "fraction", "accuracy on the task", False, 0.0, 1.0)
    parameters = (
        Parameter("chance", "fraction", 0.0, 1.0, (0.0, 0.6)),
        Parameter("gain", "fraction", 0.0, 1.0, (0.05, 1.0), linear=True),
        Parameter("k", "bytes per bit", 0.01, 1e3, (0.5, 50.0), "log"),
        Parameter("L0", "bits per byte", -20.0, 20.0, (0.1, 5.0)),
    )
    valid = "multiple-choice tasks, models of 190M to 13B parameters"
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the accuracy [S, n]; valid for complex values and far into both tails."""
        argument = values["k"] * (prepared["loss"] - values["L0"])
        # 1/(1 + exp(x)) without overflow
        reached = values["gain"] * 0.5 * (1.0 - np.tanh(0.5 * argument))
        return np.asarray(values["chance"] + (1.0 - values["chance"]) * reached)


FORMS: tuple[Form, ...] = (DownstreamError(), DownstreamSigmoid())
