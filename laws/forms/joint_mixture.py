"""Laws of a validation loss by parameters, tokens and the shares of all training domains."""

# S parameter sets, n rows, K domains

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.laws.forms.continual import LEAST_SHARE
from allometry.laws.forms.dense import D, N
from allometry.laws.forms.mixture import DomainForm, shares_of
from allometry.laws.observations import Observations


def _powers() -> tuple[Parameter, ...]:
    return (
        Parameter("E", "nats per token", 0.0, np.inf, (0.1, 3.0), "log", linear=True),
        Parameter("alpha", "1", 0.01, 2.0, (0.1, 0.8)),
        Parameter("beta", "1", 0.01, 2.0, (0.1, 0.8)),
    )


def _mixture_parameters(domains: Sequence[str]) -> tuple[Parameter, ...]:
    """Return C_j and γ_j of each domain."""
    coefficients = (
        Parameter(f"C_{d}", "1/(nats per token)", 1e-9, 1e9, (0.1, 30.0), "log") for d in domains
    )
    powers = (Parameter(f"g_{d}", "1", 1e-3, 10.0, (0.1, 2.0), "log") for d in domains)
    return (*coefficients, *powers)


class MixingAdditive(DomainForm):
    """L = E + 1/Σ_j C_j r_j^γ_j + A/N^α + B/D^β: the term of the mixture is independent of scale.

    So the best mixture is the same at every N and D, and small runs determine it. Fit it to runs of
    several mixtures at two or more sizes and horizons. The authors predict losses of 3B and 7B
    models by fits up to 1.4B with it.
    """

    name: ClassVar[str] = "mixing_additive"
    equation: ClassVar[str] = (
        "loss = E + 1 / (sum_j C_j r_j^g_j) + A/N^alpha + B/D^beta; name the shares' columns: "
        "mixing_additive:a,b,c"
    )
    source: ClassVar[str] = "Shukor et al., arXiv 2507.09404, the additive law"
    domains = ("r1", "r2")
    fewest = 2
    target = Variable("loss", "nats per token", "loss on one validation set")
    valid: ClassVar[str] = "the paper: 186M to 7B parameters"

    @classmethod
    def inputs_of(cls, domains: Sequence[str]) -> tuple[Variable, ...]:
        """Return N, D and each domain's share of the training tokens."""
        about = "share of {} in the training tokens"
        shares = tuple(Variable(d, "1", about.format(d), positive=False) for d in domains)
        return (N, D, *shares)

    @classmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters over these domains."""
        return (
            *_powers(),
            Parameter("A", "nats per token", 0.0, 1e12, (1.0, 1e5), "log", linear=True),
            Parameter("B", "nats per token", 0.0, 1e12, (1.0, 1e5), "log", linear=True),
            *_mixture_parameters(domains),
        )

    def prepare(self, observations: Observations) -> Any:
        """Return the logs of N and D [n], and the shares and their logs [n] by domain."""
        columns = super().prepare(observations)
        shares_Kn = shares_of(self, self.domains, observations).T
        logs_Kn = np.log(np.maximum(shares_Kn, LEAST_SHARE))
        return {
            "N": np.log(columns["N"]),
            "D": np.log(columns["D"]),
            "shares": dict(zip(self.domains, shares_Kn, strict=True)),
            "logs": dict(zip(self.domains, logs_Kn, strict=True)),
        }

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        size = values["A"] * np.exp(-values["alpha"] * prepared["N"])
        data = values["B"] * np.exp(-values["beta"] * prepared["D"])
        return np.asarray(values["E"] + self._of_mixture(values, prepared) + size + data)

    def _of_mixture(self, values: Values, prepared: Any) -> Any:
        """Return the term that depends on the shares only."""
        logs = prepared["logs"]
        parts = (values[f"C_{d}"] * np.exp(values[f"g_{d}"] * logs[d]) for d in self.domains)
        return 1.0 / sum(parts)


SCALES = {"N": 1e8, "D": 2e9}
"""N and D at which the joint law defines its terms of size and data."""


class MixingJoint(MixingAdditive):
    """L = E + 1/Σ_j C_j r_j^γ_j + (Σ_j A_j r_j)^μ (N/1e8)^-α + (Σ_j B_j r_j)^ν (D/2e9)^-β.

    The terms of size and data also depend on the mixture, so that the best mixture changes with the
    budget. 5 + 4 K parameters: needs runs of many mixtures at three sizes and horizons. The paper
    has plain N and D: its A_j and B_j are ``restated``; the scaled ones do not follow α and β in a
    search.
    """

    name: ClassVar[str] = "mixing_joint"
    equation: ClassVar[str] = (
        "loss = E + 1 / (sum_j C_j r_j^g_j) + (sum_j A_j r_j)^mu (N/1e8)^-alpha + "
        "(sum_j B_j r_j)^nu (D/2e9)^-beta; name the shares' columns: mixing_joint:a,b,c"
    )
    source: ClassVar[str] = "Shukor et al., arXiv 2507.09404, the joint law; A and B from memory"

    @classmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters over these domains."""
        unit = "(nats per token)^(1/{})"
        sums = [
            Parameter(f"{name}_{d}", unit.format(power), 1e-9, 1e6, (0.03, 3.0), "log")
            for name, power in (("A", "mu"), ("B", "nu"))
            for d in domains
        ]
        powers = (Parameter(name, "1", 1e-2, 1e2, (0.3, 3.0), "log") for name in ("mu", "nu"))
        return (*_powers(), *powers, *_mixture_parameters(domains), *sums)

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]; valid for complex values."""
        total = values["E"] + self._of_mixture(values, prepared)
        for name, power, exponent, log in (("A", "mu", "alpha", "N"), ("B", "nu", "beta", "D")):
            shares = prepared["shares"]
            mixed = sum(values[f"{name}_{d}"] * shares[d] for d in self.domains)
            scale = -values[exponent] * (prepared[log] - np.log(SCALES[log]))
            total = total + np.exp(values[power] * np.log(mixed) + scale)
        return np.asarray(total)

    def restated(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the paper's A_j and B_j, of plain N and D."""
        paper: dict[str, float] = {}
        for name, power, exponent, log in (("A", "mu", "alpha", "N"), ("B", "nu", "beta", "D")):
            factor = SCALES[log] ** (values[exponent] / values[power])
            paper |= {f"{name}_{d}": float(values[f"{name}_{d}"] * factor) for d in self.domains}
        return paper


FORMS: tuple[Form, ...] = (MixingAdditive(), MixingJoint())
