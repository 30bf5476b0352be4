"""Laws of mixtures: the loss of a validation set by the shares of the training domains."""

# S parameter sets, n rows, K domains, M implicit domains

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.forms.base import Form, Parameter, Predictions, Slopes, Values, Variable
from allometry.laws.observations import Observations

SUM_TOLERANCE = 0.02
"""Allowed deviation of a row's sum of shares from 1; shares are then divided by their sum."""


def shares_of(
    form: Form, domains: Sequence[str], observations: Observations
) -> NDArray[np.float64]:
    """Return the shares [n, K] of each row, which sum to one.

    Raises UserError: a column is missing, a share is negative or not finite, or the sum of a row's
    shares deviates from one by more than rounding.
    """
    missing = [domain for domain in domains if domain not in observations.columns]
    if missing:
        raise UserError(
            f"{form.name} reads a column of shares for each domain and the observations have no "
            f"{missing[0]!r}; name theirs: {form.name.partition(':')[0]}:COLUMN,COLUMN of "
            f"{', '.join(observations.columns)}"
        )
    shares_nK = np.stack([observations[domain] for domain in domains], axis=1)
    bad_nK = ~np.isfinite(shares_nK) | (shares_nK < 0.0)
    if bad_nK.any():
        row, domain = (int(i) for i in np.argwhere(bad_nK)[0])
        raise UserError(
            f"{domains[domain]} of {observations.place(row)} is "
            f"{shares_nK[row, domain]}, and {form.name} needs shares of at least 0; mend or drop it"
        )
    sums_n = shares_nK.sum(axis=1)
    off_n = np.abs(sums_n - 1.0) > SUM_TOLERANCE
    if off_n.any():
        row = int(np.argmax(off_n))
        percent = abs(sums_n[row] / 100.0 - 1.0) <= SUM_TOLERANCE
        raise UserError(
            f"the shares {', '.join(domains)} of {observations.place(row)} sum to "
            f"{sums_n[row]:.4g}, and {form.name} needs the shares of all domains, which sum to 1; "
            + (
                "they look like percent: divide each by 100, in a table --map NAME=COLUMN/100"
                if percent
                else "add the columns of the others"
            )
        )
    return np.asarray(shares_nK / sums_n[:, None])


class DomainForm(Form):
    """Base class of laws over ``fewest`` or more columns, ``domains``.

    Inputs and parameters depend on the domains.
    """

    domains: ClassVar[tuple[str, ...]]
    fewest: ClassVar[int]

    def __init_subclass__(cls) -> None:
        cls.inputs, cls.parameters = cls.inputs_of(cls.domains), cls.parameters_of(cls.domains)

    @classmethod
    @abstractmethod
    def inputs_of(cls, domains: Sequence[str]) -> tuple[Variable, ...]:
        """Return the input columns for these domains."""

    @classmethod
    @abstractmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters over these domains."""

    def for_columns(self, columns: Sequence[str]) -> Self:
        """Return this law over columns, as ``NAME:a,b,c``.

        Raises UserError: too few or not distinct.
        """
        name = self.name.partition(":")[0]
        if len(columns) < self.fewest or "" in columns or len(set(columns)) < len(columns):
            raise UserError(
                f"{name} needs at least {self.fewest} different columns, not "
                f"{','.join(columns)!r}; write {name}:COLUMN,COLUMN"
            )
        members = {
            "__module__": type(self).__module__,
            "equation": self.equation.partition(";")[0],
            "name": f"{name}:{','.join(columns)}",
            "domains": tuple(columns),
        }
        form: Self = type(type(self).__name__, (type(self),), members)()
        return form


class MixingExponential(DomainForm):
    """Data mixing laws 2403.16952: ``L = c + k exp(sum_j t_j r_j)``.

    The shares sum to one, so k would only shift all t_j: here k is 1, and t_j directly determines
    the loss with domain j alone, ``c + exp(t_j)``. Coefficients with a k are the same law with
    ``t_j + ln k``. A domain of which a trace is sufficient (formal languages, chat logs) has a t_j
    of minus hundreds.
    """

    name: ClassVar[str] = "mixing_exponential"
    domains = ("r1", "r2")
    fewest = 2
    target = Variable("loss", "nats per token", "loss on one validation set")
    source = "Ye et al. 2403.16952 (k absorbed by t, as shares sum to one)"
    valid = "one size and horizon; shares inside of the hull of those fitted; 2 to 17 domains"
    equation: ClassVar[str] = (
        "loss = c + exp(sum_j t_j r_j); name the shares' columns: mixing_exponential:a,b,c"
    )

    @classmethod
    def inputs_of(cls, domains: Sequence[str]) -> tuple[Variable, ...]:
        """Return each domain's share of the training tokens."""
        about = "share of {} in the training tokens"
        return tuple(Variable(d, "1", about.format(d), positive=False) for d in domains)

    @classmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters over these domains."""
        return (
            Parameter("c", "nats per token", 0.0, 50.0, (0.0, 5.0), linear=True),
            *(Parameter(f"t_{d}", "1", -1e3, 10.0, (-3.0, 3.0)) for d in domains),
        )

    def prepare(self, observations: Observations) -> NDArray[np.float64]:
        """Return the shares [n, K]."""
        return shares_of(self, self.domains, observations)

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        return np.asarray(values["c"] + np.exp(self._exponent(values, prepared)))

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return predictions [S, n] and derivatives [S, 1 + K, n]."""
        reducible_Sn = np.exp(self._exponent(values, prepared))
        slopes_SKn = reducible_Sn[..., None, :] * prepared.T
        ones_S1n = np.ones_like(reducible_Sn)[..., None, :]
        return values["c"] + reducible_Sn, np.concatenate([ones_S1n, slopes_SKn], axis=-2)

    def _exponent(self, values: Values, shares_nK: NDArray[np.float64]) -> Predictions:
        t_KS = [np.asarray(values[f"t_{domain}"]) for domain in self.domains]
        t_SK = np.array(t_KS) if t_KS[0].ndim == 0 else np.concatenate(t_KS, axis=-1)
        return np.asarray(t_SK @ shares_nK.T)


class MixingImplicit(MixingExponential):
    """Data mixing laws 2403.16952: the validation set is itself a mixture.

    A validation set of M unnamed domains with shares s_i has ``sum_i s_i L_i``; s_i, k_i and c_i
    enter only through ``c = sum_i s_i c_i`` and ``s_i k_i``, so with the shares of training summing
    to one the law is c and a sum of M exponentials. Here M is 2. The two exponentials are
    interchangeable, so starts agree on the objective but not on the order.
    """

    name: ClassVar[str] = "mixing_implicit"
    source = "Ye et al. 2403.16952, two implicit domains"
    equation: ClassVar[str] = (
        "loss = c + exp(sum_j t_j r_j) + exp(sum_j u_j r_j); name the shares' columns: "
        "mixing_implicit:a,b,c"
    )

    @classmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters over these domains."""
        second = tuple(Parameter(f"u_{d}", "1", -1e3, 10.0, (-3.0, 3.0)) for d in domains)
        return super().parameters_of(domains) + second

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        second_Sn = np.exp(self._second(values, prepared))
        return np.asarray(super().predict(values, prepared) + second_Sn)

    def derivatives(self, values: Values, prepared: Any) -> Slopes:
        """Return predictions [S, n] and derivatives [S, 1 + 2 K, n]."""
        first_Sn, slopes_SPn = super().derivatives(values, prepared)
        second_Sn = np.exp(self._second(values, prepared))
        more_SKn = second_Sn[..., None, :] * prepared.T
        return first_Sn + second_Sn, np.concatenate([slopes_SPn, more_SKn], axis=-2)

    def _second(self, values: Values, shares_nK: NDArray[np.float64]) -> Predictions:
        renamed = {f"t_{domain}": values[f"u_{domain}"] for domain in self.domains}
        return self._exponent(renamed, shares_nK)


FORMS: tuple[Form, ...] = (MixingExponential(), MixingImplicit())
