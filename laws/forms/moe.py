"""Laws of mixtures of experts: efficiency leverage, routed models, granularity."""

# S parameter sets, n rows; N parameters, D tokens, C FLOPs, A share of active experts,
# G granularity of the experts

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable


class EfficiencyLeverage(Form):
    """EL = Â^{a + d log10 C + γ (log2 G)² + β log2 G}, Â = A + A_start.

    Ratio of a dense model's FLOPs to the mixture's at the same loss. The bases of the logarithms
    are not in the paper's text: log10 C and log2 G reproduce its statements (above 7 at A = 3.1 %,
    G = 12, C = 1e22; best G near 12), natural logarithms are off by thousands. The paper's
    saturation of Â at A_max = 5.28e16 is beyond a double's digits and left out.
    """

    name = "efficiency_leverage"
    equation = (
        "leverage = (activation + A_start)^(a + d log10 C + gamma log2(granularity)^2 "
        "+ beta log2 granularity)"
    )
    source = "Ling, arXiv 2507.17702, table 2"
    inputs = (
        Variable("activation", "fraction", "share of the experts that a token uses", most=1.0),
        Variable("granularity", "1", "2 width / expert width"),
        Variable("C", "FLOPs", "training compute without embedding"),
    )
    target = Variable("leverage", "1", "FLOPs of the dense model of equal loss over those of this")
    parameters = (
        Parameter("a", "1", -20.0, 20.0, (-2.0, 2.0)),
        Parameter("d", "1", -2.0, 2.0, (-0.2, 0.2)),
        Parameter("gamma", "1", -2.0, 2.0, (-0.2, 0.2)),
        Parameter("beta", "1", -4.0, 4.0, (-0.5, 0.5)),
        Parameter("A_start", "fraction", 1e-6, 1.0, (1e-4, 0.5), "log"),
    )
    valid = "activation 0.4 to 100 %, granularity 2 to 16, 3e17 to 3e20 FLOPs, leverage below 6"
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "ling": {"a": 1.23, "d": -7.61e-2, "gamma": 1.67e-2, "beta": -1.17e-1, "A_start": 1.63e-2}
    }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the leverage [S, n]; valid for complex values."""
        log2_granularity = np.log2(prepared["granularity"])
        exponent = (
            values["a"]
            + values["d"] * np.log10(prepared["C"])
            + values["gamma"] * log2_granularity**2
            + values["beta"] * log2_granularity
        )
        return np.asarray(np.exp(exponent * np.log(prepared["activation"] + values["A_start"])))


class Clark(Form):
    """log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d for routed models of E experts.

    1/Ê = 1/(E − 1 + (1/E_start − 1/E_max)^−1) + 1/E_max: Ê is E_start at one expert and saturates
    at E_max. One expert for each token, routing in every second layer, 1.3e11 tokens. The bounds
    keep E_start below E_max.
    """

    name = "clark_moe"
    equation = (
        "log10 loss = a log10 N + b log10 e + c log10 N log10 e + d, "
        "1/e = 1/(experts - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max"
    )
    source = "Clark et al., arXiv 2202.01169"
    inputs = (
        Variable("N", "parameters", "parameters of the dense model beneath, embeddings included"),
        Variable("experts", "1", "experts of a routed layer, 1 for dense", least=1.0),
    )
    target = Variable("loss", "nats per token", "validation loss")
    parameters = (
        Parameter("a", "1", -2.0, 2.0, (-0.5, 0.0)),
        Parameter("b", "1", -2.0, 2.0, (-0.5, 0.5)),
        Parameter("c", "1", -1.0, 1.0, (-0.1, 0.1)),
        Parameter("d", "1", -10.0, 10.0, (0.0, 3.0)),
        Parameter("E_start", "experts", 0.1, 20.0, (0.5, 15.0), "log"),
        Parameter("E_max", "experts", 25.0, 1e9, (50.0, 1e5), "log"),
    )
    valid = "15M to 1.3B parameters, 1 to 512 experts, one expert a token, 1.3e11 tokens"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        log_size = np.log10(prepared["N"])
        effective = effective_experts(prepared["experts"], values["E_start"], values["E_max"])
        log_experts = np.log10(effective)
        log_loss = values["a"] * log_size + values["b"] * log_experts
        log_loss = log_loss + values["c"] * log_size * log_experts + values["d"]
        return np.asarray(np.exp(np.log(10.0) * log_loss))


def effective_experts(experts: Any, start: Any, most: Any) -> Any:
    """Return Ê of arXiv 2202.01169: ``start`` at one expert, at most ``most``."""
    offset = 1.0 / (1.0 / start - 1.0 / most)
    return 1.0 / (1.0 / (experts - 1.0 + offset) + 1.0 / most)


class Granularity(Form):
    """L = c + (g / G^γ + a) / N^α + b / D^β for mixtures whose experts are cut G times finer.

    The loss of this law falls without limit in G; the limit is the cost of routing, which is not
    part of the law: 14 d E G FLOPs per token and layer of width d, in addition to 72 d² of the
    matrices, for experts with E times the dense block's parameters.
    """

    name = "granularity"
    equation = "loss = c + (g / granularity^gamma + a) / N^alpha + b / D^beta"
    source = "Krajewski et al., arXiv 2402.07871"
    inputs = (
        Variable("N", "parameters", "all parameters without embeddings"),
        Variable("D", "tokens", "tokens of the run"),
        Variable("granularity", "1", "feed-forward width of the dense block / expert width"),
    )
    target = Variable("loss", "nats per token", "final training loss")
    parameters = (
        Parameter("c", "nats per token", 0.0, 20.0, (0.0, 4.0), linear=True),
        Parameter("g", "nats per token", 1e-9, 1e12, (1e-2, 1e4), "log", linear=True),
        Parameter("gamma", "1", 0.01, 5.0, (0.1, 2.0)),
        Parameter("a", "nats per token", 1e-9, 1e12, (1e-2, 1e4), "log", linear=True),
        Parameter("alpha", "1", 0.01, 2.0, (0.05, 0.8)),
        Parameter("b", "nats per token", 1e-9, 1e12, (1e-2, 1e4), "log", linear=True),
        Parameter("beta", "1", 0.01, 2.0, (0.05, 0.8)),
    )
    valid = "129M to 3.7B parameters, 16B to 130B tokens, granularity 1 to 16, 64x the experts"
    # gamma was read in a secondary text; the other six are from memory and not verified by a test.
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "krajewski": {
            "c": 0.47, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115, "b": 30.8, "beta": 0.147,
        }
    }  # fmt: skip

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        finer = values["g"] * np.exp(-values["gamma"] * np.log(prepared["granularity"]))
        size = (finer + values["a"]) * np.exp(-values["alpha"] * np.log(prepared["N"]))
        data = values["b"] * np.exp(-values["beta"] * np.log(prepared["D"]))
        return np.asarray(values["c"] + size + data)


FORMS: tuple[Form, ...] = (EfficiencyLeverage(), Clark(), Granularity())
