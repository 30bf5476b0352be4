"""Laws of continual pretraining: losses by the share of the new domain (D-CPT and CMR)."""

# S parameter sets, n rows

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Slopes, Values, Variable
from allometry.laws.observations import Observations

LEAST_SHARE = 1e-300
"""Replacement of a zero share under a power: r^eta is then 0 for any relevant eta."""

CMR_TOKENS = 0.2e9
"""Tokens in one unit of T in 2407.17467."""

_N = Variable("N", "parameters", "all parameters of the model")
_D = Variable("D", "tokens", "tokens of the continual pretraining")
_R = Variable(
    "r", "1", "share, in training, of the corpus whose loss is measured, 0 to 1", False, 0.0, 1.0
)
_LOSS = Variable("loss", "nats per token", "validation loss on one corpus, domain's or general")
_CHANGE = Variable("dloss", "nats per token", "loss minus the loss at the start", positive=False)


def _power_law(unit: str) -> tuple[Parameter, ...]:
    return (
        Parameter("a", unit, -1e3, 1e3, (-10.0, 10.0), linear=True),
        Parameter("s", "1", -3.0, 3.0, (-1.0, 1.0)),
        Parameter("b", unit, -1e3, 1e3, (-10.0, 10.0), linear=True),
    )


class DomainContinual(Form):
    """The D-CPT law, 2406.01375: one fit for the domain's loss, another for the general loss.

    ``r`` is the share of the corpus on which the loss is measured: of the domain for the domain's
    loss, one minus that for the general loss.
    """

    name: ClassVar[str] = "d_cpt"
    equation: ClassVar[str] = "loss = E + A/N^alpha + B r^eta/D^beta + C/(r + eps)^gamma"
    source: ClassVar[str] = "Que et al. 2406.01375 (D-CPT law)"
    inputs: ClassVar[tuple[Variable, ...]] = (_N, _D, _R)
    target = _LOSS
    valid: ClassVar[str] = "Qwen1.5 of 0.5, 1.8 and 4B; 0.1 to 26B tokens; shares 0 to 1"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", "nats per token", 0.0, 20.0, (0.0, 3.0), linear=True),
        Parameter("A", "nats per token", 0.0, 1e12, (0.0, 1e3), linear=True),
        Parameter("B", "nats per token", 0.0, 1e12, (0.0, 1e3), linear=True),
        Parameter("C", "nats per token", 0.0, 1e6, (0.0, 10.0), linear=True),
        Parameter("alpha", "1", 0.01, 2.0, (0.05, 1.0)),
        Parameter("beta", "1", 0.01, 2.0, (0.05, 1.0)),
        Parameter("eta", "1", 0.01, 10.0, (0.1, 3.0), scale="log"),
        Parameter("gamma", "1", 0.01, 10.0, (0.05, 3.0), scale="log"),
        Parameter("eps", "1", 1e-4, 10.0, (1e-3, 1.0), scale="log"),
    )

    def prepare(self, observations: Observations) -> Any:
        """Return the columns and the logs of columns under a power."""
        columns = super().prepare(observations)
        logs = {name: np.log(columns[name]) for name in ("N", "D")}
        return {**columns, "log": {**logs, "r": np.log(np.maximum(columns["r"], LEAST_SHARE))}}

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        size, data, share = self._parts(values, prepared)
        loss = values["E"] + values["A"] * size + values["B"] * data + values["C"] * share
        return np.asarray(loss)

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return predictions [S, n] and derivatives [S, 9, n]."""
        size, data, share = self._parts(values, prepared)
        log, r_n = prepared["log"], prepared["r"]
        A, B, C = values["A"] * size, values["B"] * data, values["C"] * share
        near = r_n + values["eps"]
        loss_Sn: Predictions = values["E"] + A + B + C
        slopes = (
            *(np.ones_like(loss_Sn), size, data, share),
            *(-log["N"] * A, -log["D"] * B, log["r"] * B),
            *(-np.log(near) * C, -values["gamma"] * C / near),
        )
        return loss_Sn, np.stack(slopes, axis=-2)

    def _parts(self, values: Values, prepared: Any) -> tuple[Any, Any, Any]:
        """Return the factors of A, B and C, each [S, n]."""
        log, r_n = prepared["log"], prepared["r"]
        size = np.exp(-values["alpha"] * log["N"])
        data = np.exp(values["eta"] * log["r"] - values["beta"] * log["D"])
        return size, data, np.exp(-values["gamma"] * np.log(r_n + values["eps"]))


class CrossDomainContinual(DomainContinual):
    """The cross-domain D-CPT law, 2406.01375: one fit for several domains, distinguished by K.

    ``K = w1/k1 + w2 k2`` with k1 the domain's loss before the training and k2 the initial rate of
    its fall. F and the scale of K are one number, so here w1 is 1: ``w`` is w2/w1 and ``F`` is the
    paper's F/w1^mu. Fit it to three domains or more; with two, E, F and mu are not identified.
    """

    name: ClassVar[str] = "d_cpt_cross"
    equation: ClassVar[str] = f"{DomainContinual.equation} + F/K^mu, K = 1/k1 + w k2"
    source: ClassVar[str] = "Que et al. 2406.01375 (cross-domain D-CPT law)"
    inputs: ClassVar[tuple[Variable, ...]] = (
        *DomainContinual.inputs,
        Variable("k1", "nats per token", "loss on the domain before continual pretraining"),
        Variable("k2", "nats per token per unit of yours", "rate of its fall at the start"),
    )
    valid: ClassVar[str] = f"{DomainContinual.valid}; six domains"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *DomainContinual.parameters,
        Parameter("F", "nats per token", 0.0, 1e6, (0.0, 10.0), linear=True),
        Parameter("mu", "1", 0.01, 10.0, (0.05, 3.0), scale="log"),
        Parameter("w", "1", 1e-4, 1e4, (1e-2, 1e2), scale="log"),
    )

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        more_Sn = values["F"] * self._domain(values, prepared)[1]
        return np.asarray(super().predict(values, prepared) + more_Sn)

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return predictions [S, n] and derivatives [S, 12, n]."""
        loss_Sn, slopes_SPn = super().derivatives(values, prepared)
        coefficient_Sn, part_Sn = self._domain(values, prepared)
        F = values["F"] * part_Sn
        more = (
            *(part_Sn, -np.log(coefficient_Sn) * F),
            -values["mu"] * F * prepared["k2"] / coefficient_Sn,
        )
        total_Sn: Predictions = loss_Sn + F
        return total_Sn, np.concatenate([slopes_SPn, np.stack(more, axis=-2)], axis=-2)

    def _domain(self, values: Values, prepared: Any) -> tuple[Any, Any]:
        """Return K and the factor of F, each [S, n]."""
        coefficient_Sn = 1.0 / prepared["k1"] + values["w"] * prepared["k2"]
        return coefficient_Sn, np.exp(-values["mu"] * np.log(coefficient_Sn))


class _Power(Form):
    """Base class of ``a x^s + b`` with one input x, whose log ``prepare`` returns.

    As s approaches zero, a and b grow without changing the curve, which becomes a logarithm.
    """

    source: ClassVar[str] = "Gu et al. 2407.17467 (CMR scaling law)"

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the target [S, n]."""
        return np.asarray(values["a"] * np.exp(values["s"] * prepared) + values["b"])


class _PowerOfTokens(_Power):
    """Law ``a T^s + b`` with T in the units of 2407.17467, which only scale a."""

    equation: ClassVar[str] = "a T^s + b, T = D/0.2e9"
    inputs: ClassVar[tuple[Variable, ...]] = (_D,)
    residual = "linear"
    valid: ClassVar[str] = "0.46 to 3.1B parameters, finance and papers; up to 20B tokens (T = 100)"
    parameters: ClassVar[tuple[Parameter, ...]] = _power_law("1")

    def prepare(self, observations: Observations) -> Any:
        """Return log T."""
        return np.log(super().prepare(observations)["D"] / CMR_TOKENS)


class CriticalShare(_PowerOfTokens):
    """CMR scaling law, 2407.17467: the critical mixture ratio by the number of training tokens.

    Fit it to the result of ``allometry.laws.continual.critical_shares`` at several horizons.
    Predictions are limited to [0, 1], which the power law leaves far outside of the data.
    """

    name: ClassVar[str] = "cmr_critical"
    equation: ClassVar[str] = f"R = {_PowerOfTokens.equation}"
    target = Variable(
        "R",
        "1",
        "largest share of the domain that keeps the general loss in bound",
        least=0.0,
        most=1.0,
    )
    published: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "finance 460M": {"a": 0.22524761, "s": 0.26944345, "b": -0.48139982},
        "finance 940M": {"a": 0.7520627, "s": 0.13720245, "b": -1.06581937},
        "finance 1.6B": {"a": -2.36384831, "s": -0.15125569, "b": 1.59223649},
        "finance 3.1B": {"a": -2.5368197, "s": -0.42071423, "b": 0.84375368},
    }


class DomainChange(_PowerOfTokens):
    """2407.17467: change of the domain's loss after D tokens, at one size and share."""

    name: ClassVar[str] = "cmr_domain"
    equation: ClassVar[str] = f"dloss = {_PowerOfTokens.equation}"
    target = _CHANGE
    parameters: ClassVar[tuple[Parameter, ...]] = _power_law("nats per token")


class GeneralChange(_PowerOfTokens):
    """2407.17467: change of the general loss after D tokens, which rises and may then fall.

    The paper's two exponents are s and s + gap here, so that they cannot be exchanged.
    """

    name: ClassVar[str] = "cmr_general"
    equation: ClassVar[str] = "dloss = a T^s + a2 T^(s + gap) + b, T = D/0.2e9"
    target = _CHANGE
    parameters: ClassVar[tuple[Parameter, ...]] = (
        *_power_law("nats per token"),
        Parameter("a2", "nats per token", -1e3, 1e3, (-10.0, 10.0), linear=True),
        Parameter("gap", "1", 0.01, 5.0, (0.1, 2.0), scale="log"),
    )

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the change of the loss [S, n]."""
        second = values["a2"] * np.exp((values["s"] + values["gap"]) * prepared)
        return np.asarray(super().predict(values, prepared) + second)


class DomainLossByShare(_Power):
    """2407.17467: the domain's loss at one size and horizon, by the domain's share."""

    name: ClassVar[str] = "cmr_domain_share"
    equation: ClassVar[str] = "loss = a r^s + b"
    inputs: ClassVar[tuple[Variable, ...]] = (
        Variable("r", "1", "share of the domain in training, above 0", most=1.0),
    )
    target = Variable("loss", "nats per token", "validation loss on the domain")
    valid: ClassVar[str] = "0.46 to 3.1B parameters; shares from 1/4 to 1"
    parameters: ClassVar[tuple[Parameter, ...]] = _power_law("nats per token")

    def prepare(self, observations: Observations) -> Any:
        """Return log r."""
        columns = super().prepare(observations)
        return np.log(columns["r"])


FORMS: tuple[Form, ...] = (
    DomainContinual(),
    CrossDomainContinual(),
    CriticalShare(),
    DomainChange(),
    GeneralChange(),
    DomainLossByShare(),
)
