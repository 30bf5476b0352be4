"""Laws of numerical precision: floating-point training, quantized training, effective size."""

# S parameter sets, n rows; N parameters, D tokens

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.laws.observations import Observations

_SIZE = Variable("N", "parameters", "parameters without embeddings")
_TOKENS = Variable("D", "tokens", "tokens of the run")
_LOSS = Variable("loss", "nats per token", "final training loss")


class FloatTraining(Form):
    """L = n/N^α + d/D^β + ε + (D^β/N^α) log2(block) / (γ (E+½)^δ (M+½)^ν).

    Training with products in floats of E exponent and M mantissa bits, scaled in blocks of
    ``block`` numbers. The last term grows with D: above some D (``cautions``) more data increase
    the loss.
    """

    name = "float_training"
    equation = (
        "loss = n/N^alpha + d/D^beta + epsilon + (D^beta/N^alpha) log2(block) "
        "/ (gamma (exponent_bits + 0.5)^delta (mantissa_bits + 0.5)^nu)"
    )
    source = "arXiv 2501.02423, table 2"
    inputs = (
        _SIZE,
        _TOKENS,
        Variable("exponent_bits", "bits", "exponent bits E", positive=False, least=0.0),
        Variable("mantissa_bits", "bits", "mantissa bits M", positive=False, least=0.0),
        Variable("block", "1", "numbers that share a scale", least=1.0),
    )
    target = _LOSS
    parameters = (
        Parameter("n", "nats per token", 1e-6, 1e15, (1.0, 1e6), "log", linear=True),
        Parameter("alpha", "1", 0.01, 2.0, (0.05, 0.8)),
        Parameter("d", "nats per token", 1e-6, 1e15, (1.0, 1e6), "log", linear=True),
        Parameter("beta", "1", 0.01, 2.0, (0.05, 0.8)),
        Parameter("epsilon", "nats per token", 0.0, 20.0, (0.0, 4.0), linear=True),
        Parameter("gamma", "1", 1e-6, 1e18, (1.0, 1e8), "log"),
        Parameter("delta", "1", 0.0, 20.0, (0.2, 6.0)),
        Parameter("nu", "1", 0.0, 20.0, (0.2, 6.0)),
    )
    valid = "41M to 679M parameters, 1 to 6 exponent and mantissa bits; checked at 1.2B"
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "paper": {
            "n": 69.2343, "alpha": 0.2368, "d": 68973.0621, "beta": 0.5162,
            "epsilon": 1.9061, "gamma": 11334.5197, "delta": 3.1926, "nu": 2.9543,
        }
    }  # fmt: skip

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        size = np.exp(-values["alpha"] * np.log(prepared["N"]))
        data = np.exp(values["beta"] * np.log(prepared["D"]))
        fineness = _fineness(values, prepared["exponent_bits"], prepared["mantissa_bits"])
        rounding = data * size * np.log2(prepared["block"]) / fineness
        return np.asarray(values["n"] * size + values["d"] / data + values["epsilon"] + rounding)

    def cautions(self, values: Mapping[str, float], observations: Observations) -> list[str]:
        """Return a sentence for each row with more tokens than the optimum.

        ∂L/∂D = 0 at D^{2β} = d γ (E+½)^δ (M+½)^ν N^α / log2(block); never for blocks of one.
        """
        columns = self.prepare(observations)
        fineness = _fineness(values, columns["exponent_bits"], columns["mantissa_bits"])
        with np.errstate(divide="ignore"):
            power = values["d"] * fineness * columns["N"] ** values["alpha"]
            turn_n = (power / np.log2(columns["block"])) ** (0.5 / values["beta"])
        harmed = np.flatnonzero(columns["D"] > turn_n)
        return [
            f"more tokens raise the loss at D={columns['D'][i]:.4g} and N={columns['N'][i]:.4g} in "
            f"this precision: by this law it is least at {turn_n[i]:.4g} tokens"
            for i in harmed
        ]


def _fineness(values: Values, exponent_bits: Any, mantissa_bits: Any) -> Any:
    """Return γ (E+½)^δ (M+½)^ν."""
    return values["gamma"] * np.exp(
        values["delta"] * np.log(exponent_bits + 0.5) + values["nu"] * np.log(mantissa_bits + 0.5)
    )


class QuantisedTraining(Form):
    """δ(N, D, G) = k D^{γD} (log2 G)^{γG} / N^{γN}: loss increase of quantization-aware training.

    The difference from the loss of the same run in bf16; G numbers share a scale (at least 2). It
    is added to a law of the bf16 loss.
    """

    name = "qat"
    equation = "rise = k D^gamma_D log2(group_size)^gamma_G / N^gamma_N"
    source = "arXiv 2505.14302"
    inputs = (_SIZE, _TOKENS, Variable("group_size", "1", "numbers that share a scale", least=2.0))
    target = Variable("rise", "nats per token", "loss above that of the same run in bf16")
    parameters = (
        Parameter("k", "nats per token", 1e-12, 1e9, (1e-5, 1e3), "log", linear=True),
        Parameter("gamma_N", "1", -2.0, 3.0, (0.0, 1.0)),
        Parameter("gamma_D", "1", -2.0, 3.0, (0.0, 1.0)),
        Parameter("gamma_G", "1", -2.0, 5.0, (0.0, 2.0)),
    )
    valid = "74M to 595M parameters, 10B to 100B tokens, 4-bit weights and activations"
    # From memory, and not verified by a test.
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "w4a4": {"k": 0.1582, "gamma_N": 0.2186, "gamma_D": 0.0745, "gamma_G": 0.7779}
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the rise [S, n]; valid for complex values."""
        exponent = (
            values["gamma_D"] * np.log(prepared["D"])
            - values["gamma_N"] * np.log(prepared["N"])
            + values["gamma_G"] * np.log(np.log2(prepared["group_size"]))
        )
        return np.asarray(values["k"] * np.exp(exponent))


class PrecisionEffective(Form):
    """L = E + A/N_eff^α + B/D^β with N_eff = N Π_i (1 − exp(−P_i/γ_i)).

    P_i bits of weights, activations and key/value cache: fewer bits reduce the effective size. The
    form is from memory, without a check against the paper, and no coefficients are given.
    """

    name = "precision_effective"
    equation = (
        "loss = E + A/N_eff^alpha + B/D^beta, N_eff = N (1 - exp(-weight_bits/gamma_w)) "
        "(1 - exp(-activation_bits/gamma_a)) (1 - exp(-cache_bits/gamma_kv))"
    )
    source = "Kumar et al., arXiv 2411.04330, from memory"
    inputs = (
        _SIZE,
        _TOKENS,
        Variable("weight_bits", "bits", "bits of a weight in training"),
        Variable("activation_bits", "bits", "bits of an activation"),
        Variable("cache_bits", "bits", "bits of a key or value"),
    )
    target = _LOSS
    parameters = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 4.0), linear=True),
        Parameter("A", "nats per token", 1e-6, 1e12, (1.0, 1e5), "log", linear=True),
        Parameter("alpha", "1", 0.01, 2.0, (0.05, 0.8)),
        Parameter("B", "nats per token", 1e-6, 1e12, (1.0, 1e5), "log", linear=True),
        Parameter("beta", "1", 0.01, 2.0, (0.05, 0.8)),
        Parameter("gamma_w", "bits", 0.01, 100.0, (0.3, 10.0), "log"),
        Parameter("gamma_a", "bits", 0.01, 100.0, (0.3, 10.0), "log"),
        Parameter("gamma_kv", "bits", 0.01, 100.0, (0.3, 10.0), "log"),
    )
    valid = "30M to 220M parameters, up to 26B tokens, 3 to 12 bits"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        ln_effective = np.log(prepared["N"])
        scales = {"weight_bits": "gamma_w", "activation_bits": "gamma_a", "cache_bits": "gamma_kv"}
        for bits, scale in scales.items():
            ln_effective = ln_effective + np.log(1.0 - np.exp(-prepared[bits] / values[scale]))
        size = values["A"] * np.exp(-values["alpha"] * ln_effective)
        data = values["B"] * np.exp(-values["beta"] * np.log(prepared["D"]))
        return np.asarray(values["E"] + size + data)


FORMS: tuple[Form, ...] = (FloatTraining(), QuantisedTraining(), PrecisionEffective())
