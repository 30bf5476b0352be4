"""Laws of repeated data: value of tokens that are read again (2305.16264)."""

# S parameter sets, n rows

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, LogForm, Parameter, Predictions, Values, Variable

_N = Variable("N", "parameters", "all parameters")
_D = Variable("D", "tokens", "tokens seen, repetitions included")
_LOSS = Variable("loss", "nats per token", "validation loss")
_EXPONENT = Parameter("alpha", "1", 0.01, 2.0, (0.05, 1.0))


def effective(unique: Any, repeats: Any, half_life: Any) -> Any:
    """Return the value of ``repeats`` repetitions of ``unique`` in unique samples.

    ``unique (1 + h (1 - exp(-repeats / h)))``: a first repetition has nearly the value of new data,
    and all repetitions together never more than ``h`` times the value. For example,
    ``effective(1e9, 3.0, 15.4)`` for four epochs.
    """
    return unique * (1.0 - half_life * np.expm1(-repeats / half_life))


def optimal_parameters(values: Values, tokens: Any) -> Any:
    """Return the N of the least loss at the compute (6 N D) of the optimum for D ``tokens``.

    From ``A/N^alpha + B/D^beta``: the optimum has ``alpha A / N^alpha = beta B / D^beta``.
    """
    alpha, beta = values["alpha"], values.get("beta", values["alpha"])
    ratio = alpha * values["A"] / (beta * values["B"])
    return np.exp((np.log(ratio) + beta * np.log(tokens)) / alpha)


class DataConstrained(Form):
    """Data-constrained law, 2305.16264: repetitions and surplus parameters decay exponentially.

    ``U_N``, the parameters that U tokens can use, is the compute-optimal number for D = U, so A and
    B enter twice and are not linear. alpha and beta are free; the paper ties them
    (``data_constrained_tied``).
    """

    name: ClassVar[str] = "data_constrained"
    equation: ClassVar[str] = (
        "loss = E + A/N'^alpha + B/D'^beta, D' = U_D (1 + R_D (1 - exp(-(D/U_D - 1)/R_D))), "
        "N' = U_N (1 + R_N (1 - exp(-(N/U_N - 1)/R_N))), U_D = min(U, D), U_N = min(N, N_opt(U))"
    )
    source: ClassVar[str] = "Muennighoff et al. 2305.16264"
    inputs: ClassVar[tuple[Variable, ...]] = (
        _N,
        _D,
        Variable("U", "tokens", "unique tokens available"),
    )
    target = _LOSS
    valid: ClassVar[str] = (
        "7M to 8.7B parameters, up to 900B tokens; it ranks choices of epochs: its mean error is "
        "near 9 % on the paper's own runs"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 3.0), linear=True),
        Parameter("A", "nats per token", 1e-2, 1e12, (1.0, 1e8), scale="log"),
        Parameter("B", "nats per token", 1e-2, 1e12, (1.0, 1e8), scale="log"),
        _EXPONENT,
        Parameter("beta", "1", 0.01, 2.0, (0.05, 1.0)),
        Parameter("R_D", "epochs", 0.05, 1e4, (0.5, 100.0), scale="log"),
        Parameter("R_N", "1", 0.05, 1e4, (0.5, 100.0), scale="log"),
    )
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "C4": {
            "E": float(np.exp(0.6254804)),
            "A": float(np.exp(6.255414)),
            "B": float(np.exp(7.3049974)),
            "alpha": 0.3526596,
            "beta": 0.3526596,
            "R_D": 15.387756,
            "R_N": 5.309743,
        }
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        size_Sn, data_Sn = self.effective_sizes(values, prepared)
        beta = values.get("beta", values["alpha"])
        size = values["A"] * np.exp(-values["alpha"] * np.log(size_Sn))
        return np.asarray(values["E"] + size + values["B"] * np.exp(-beta * np.log(data_Sn)))

    def effective_sizes(self, values: Values, prepared: Any) -> tuple[Any, Any]:
        """Return N' and D' [S, n]: equivalent parameters and unique tokens."""
        size_n, seen_n = prepared["N"], prepared["D"]
        unique_n = np.minimum(prepared["U"], seen_n)
        data_Sn = effective(unique_n, seen_n / unique_n - 1.0, values["R_D"])
        useful_Sn = optimal_parameters(values, prepared["U"])
        useful_Sn = np.where(np.real(useful_Sn) < size_n, useful_Sn, size_n)
        return effective(useful_Sn, size_n / useful_Sn - 1.0, values["R_N"]), data_Sn


class DataConstrainedTied(DataConstrained):
    """2305.16264 as fitted in the paper: alpha = beta."""

    name: ClassVar[str] = "data_constrained_tied"
    equation: ClassVar[str] = f"{DataConstrained.equation}, beta = alpha"
    parameters: ClassVar[tuple[Parameter, ...]] = tuple(
        parameter for parameter in DataConstrained.parameters if parameter.name != "beta"
    )
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "C4": {k: v for k, v in DataConstrained.published["C4"].items() if k != "beta"}
    }


class TiedPower(LogForm):
    """Stage 1 of 2305.16264: runs without repetition, alpha = beta, so N and D grow equally."""

    name: ClassVar[str] = "unique_data_tied"
    equation: ClassVar[str] = "loss = E + A/N^alpha + B/D^alpha"
    source: ClassVar[str] = "Muennighoff et al. 2305.16264, the fit of A, B, E and alpha"
    inputs: ClassVar[tuple[Variable, ...]] = (_N, _D)
    target = _LOSS
    valid: ClassVar[str] = "7M to 8.7B parameters on C4, no token seen twice"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 3.0), linear=True),
        Parameter("A", "nats per token", 0.0, 1e12, (0.0, 1e4), linear=True),
        Parameter("B", "nats per token", 0.0, 1e12, (0.0, 1e4), linear=True),
        _EXPONENT,
    )

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        size, data = (np.exp(-values["alpha"] * log) for log in prepared)
        return np.asarray(values["E"] + values["A"] * size + values["B"] * data)


FORMS: tuple[Form, ...] = (DataConstrained(), DataConstrainedTied(), TiedPower())
