"""Laws of learning rate and batch size: the surface of one sweep, and its optimum by N and D."""

# S parameter sets, n rows; N parameters, D tokens of the run, B tokens of a step; an octave is a
# factor of two

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.scaling.hyperlaws import step_law

_RATE = Variable("lr", "1", "peak learning rate")
_BATCH = Variable("B", "tokens", "tokens of a step")
_SIZE = Variable("N", "parameters", "parameters without embeddings")
_TOKENS = Variable("D", "tokens", "tokens of the run")


class HyperparameterSurface(Form):
    """Paraboloid in octaves of learning rate and batch around the optimum, for runs of one N and D.

    L = L_min + (p u² + 2 ρ √(pq) u v + q v²), u = log2(lr/lr_best), v = log2(B/B_best). |ρ| < 1
    makes it convex. Losses far from the optimum are not parabolic: fit runs near the best one
    (``laws.surfaces`` selects them).
    """

    name = "hyperparameter_surface"
    equation = (
        "loss = L_min + p u^2 + 2 rho sqrt(p q) u v + q v^2, "
        "u = log2(lr/lr_best), v = log2(B/B_best)"
    )
    source = "quadratic around the optimum; grids as in Step Law, arXiv 2503.04715"
    inputs = (_RATE, _BATCH)
    target = Variable("loss", "nats per token", "final loss")
    parameters = (
        Parameter("L_min", "nats per token", 0.0, 50.0, (0.5, 6.0), linear=True),
        Parameter("lr_best", "1", 1e-8, 1e3, (1e-5, 1e-1), "log"),
        Parameter("B_best", "tokens", 1.0, 1e12, (1e3, 1e7), "log"),
        Parameter("p", "nats per token per octave^2", 1e-9, 10.0, (1e-4, 0.1), "log"),
        Parameter("q", "nats per token per octave^2", 1e-9, 10.0, (1e-4, 0.1), "log"),
        Parameter("rho", "1", -0.999, 0.999, (-0.8, 0.8)),
    )
    valid = "runs of one model and horizon, within about two octaves of the best"
    residual = "linear"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        octave = math.log(2.0)
        u = (np.log(prepared["lr"]) - np.log(values["lr_best"])) / octave
        v = (np.log(prepared["B"]) - np.log(values["B_best"])) / octave
        p, q, rho = values["p"], values["q"], values["rho"]
        return np.asarray(
            values["L_min"] + p * u * u + 2.0 * rho * np.sqrt(p * q) * u * v + q * v * v
        )


class LearningRateLaw(Form):
    """lr_best = c N^a D^b: the best learning rates of sweeps over sizes and horizons."""

    name = "learning_rate_law"
    equation = "lr = c N^a D^b"
    source = "Step Law, arXiv 2503.04715"
    inputs = (_SIZE, _TOKENS)
    target = Variable("lr", "1", "best peak learning rate")
    parameters = (
        Parameter("c", "1", 1e-12, 1e12, (1e-4, 1e4), "log", linear=True),
        Parameter("a", "1", -5.0, 5.0, (-1.0, 1.0)),
        Parameter("b", "1", -5.0, 5.0, (-1.0, 1.0)),
    )
    valid = "59M to 1.07B parameters, 4e9 to 1e11 tokens, AdamW, cosine to a fixed 1e-5"
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "step_law": {
            "c": step_law(1.0, 1.0)[0],
            "a": math.log(step_law(math.e, 1.0)[0] / step_law(1.0, 1.0)[0]),
            "b": math.log(step_law(1.0, math.e)[0] / step_law(1.0, 1.0)[0]),
        }
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the learning rate [S, n]; valid for complex values."""
        exponent = values["a"] * np.log(prepared["N"]) + values["b"] * np.log(prepared["D"])
        return np.asarray(values["c"] * np.exp(exponent))


class BatchLaw(Form):
    """B_best = c D^b: the best batch size of sweeps, for any model size."""

    name = "batch_law"
    equation = "B = c D^b"
    source = "Step Law, arXiv 2503.04715"
    inputs = (_TOKENS,)
    target = Variable("B", "tokens", "best tokens of a step")
    parameters = (
        Parameter("c", "tokens", 1e-12, 1e12, (1e-4, 1e6), "log", linear=True),
        Parameter("b", "1", -5.0, 5.0, (-1.0, 1.0)),
    )
    valid = LearningRateLaw.valid
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "step_law": {
            "c": step_law(1.0, 1.0)[1],
            "b": math.log(step_law(1.0, math.e)[1] / step_law(1.0, 1.0)[1]),
        }
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the batch size [S, n]; valid for complex values."""
        return np.asarray(values["c"] * np.exp(values["b"] * np.log(prepared["D"])))


FORMS: tuple[Form, ...] = (HyperparameterSurface(), LearningRateLaw(), BatchLaw())
