"""Law of parallel streams: one set of weights, run P times on learned views of its input."""

# S parameter sets, n rows; N parameters, P streams

from __future__ import annotations

from typing import Any

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable


class ParallelScaling(Form):
    """L = E + (A / (N (k ln P + 1)))^α: P streams equal k ln P + 1 times the parameters.

    A is in parameters here; the authors' code has it in billions. The number of tokens is the same
    in all runs and has no term.
    """

    name = "parallel_scaling"
    equation = "loss = E + (A / (N (k ln(streams) + 1)))^alpha"
    source = "Chen et al. (ParScale), arXiv 2505.10475"
    inputs = (
        Variable("N", "parameters", "parameters without embeddings"),
        Variable("streams", "1", "parallel streams P", least=1.0),
    )
    target = Variable("loss", "nats per token", "final training loss")
    parameters = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 4.0), linear=True),
        Parameter("A", "parameters", 1e-3, 1e18, (1e3, 1e12), "log"),
        Parameter("k", "1", 0.0, 20.0, (0.05, 2.0)),
        Parameter("alpha", "1", 0.01, 2.0, (0.05, 0.8)),
    )
    valid = "0.5B to 4.4B parameters, 1 to 8 streams, 42B tokens"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        worth = np.log(prepared["N"]) + np.log(stream_factor(values["k"], prepared["streams"]))
        return np.asarray(values["E"] + np.exp(values["alpha"] * (np.log(values["A"]) - worth)))


def stream_factor(k: Any, streams: Any) -> Any:
    """Return the factor of parameters to which P streams are equivalent: k ln P + 1."""
    return k * np.log(streams) + 1.0


FORMS: tuple[Form, ...] = (ParallelScaling(),)
