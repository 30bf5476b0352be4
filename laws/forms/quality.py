"""Laws of data quality: pools of different quality, whose value decays over epochs (2404.07177)."""

# S parameter sets, n rows, J epochs after the first, K pools

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.forms.base import Form, Parameter, Predictions, Values, Variable
from allometry.laws.forms.mixture import DomainForm
from allometry.laws.observations import Observations

MAX_EPOCHS = 1000
"""Maximum number of epochs in one row, because each epoch is computed."""


class QualityPools(DomainForm):
    """Quality-quantity law, 2404.07177: the value of a pool halves every tau epochs.

    ``loss = d + (D_1/D0)^-b prod_j (D_j/D_{j-1})^{-b_j}`` with D_j the samples after j epochs and
    ``b_j = b 0.5^{(j - 1)/tau}``. For several pools in one mixture, b_j is the mean of the pools'
    b_j over samples, and a pool that is a fraction f of the mixture has tau/f in place of tau (the
    paper's pools are of one size, where that is tau times their number). Columns: samples seen, D,
    and for each pool its unique samples, zero if not used.

    Here b is the paper's -b, so that it is positive. The paper's code also multiplies d by the
    product over later epochs; its equation, and this law, do not.
    """

    name: ClassVar[str] = "quality_pools"
    domains = ("pool1", "pool2")
    fewest = 1
    equation: ClassVar[str] = (
        "loss = d + (D_1/D0)^-b prod_j (D_j/D_{j-1})^-b_j, b_j = b 0.5^{(j-1)/tau}; "
        "name the pools' columns: quality_pools:a,b"
    )
    source: ClassVar[str] = "Goyal et al. 2404.07177"
    target = Variable("loss", "unit of the data", "error or loss, above its floor d")
    valid: ClassVar[str] = "CLIP on pools of 12.8M pairs, 32 to 640M samples seen, up to 10 epochs"

    @classmethod
    def inputs_of(cls, domains: Sequence[str]) -> tuple[Variable, ...]:
        """Return the columns for these pools."""
        return (
            Variable("D", "samples", "samples (or tokens) seen, repetitions included"),
            *(Variable(p, "samples", f"unique ones of {p}", positive=False) for p in domains),
        )

    @classmethod
    def parameters_of(cls, domains: Sequence[str]) -> tuple[Parameter, ...]:
        """Return the parameters of these pools."""
        return (
            Parameter("d", "unit of the data", 0.0, 50.0, (0.0, 3.0), linear=True),
            Parameter("D0", "samples", 1e-6, 1e18, (1e2, 1e9), scale="log"),
            *(Parameter(f"b_{p}", "1", 1e-3, 3.0, (0.02, 1.0), scale="log") for p in domains),
            *(Parameter(f"tau_{p}", "epochs", 0.05, 1e3, (0.5, 50.0), "log") for p in domains),
        )

    def prepare(self, observations: Observations) -> Any:
        """Return logs of the first epoch's samples [n] and later ratios [J, n], fractions [K, n].

        The fractions are the pools' shares of a row's unique samples.
        """
        missing = [pool for pool in self.domains if pool not in observations.columns]
        if missing:
            raise UserError(
                f"{self.name} reads a column of unique samples for each pool and the observations "
                f"have no {missing[0]!r}; name theirs: quality_pools:COLUMN,COLUMN of "
                f"{', '.join(observations.columns)}"
            )
        columns = super().prepare(observations)
        unique_Kn = np.stack([columns[pool] for pool in self.domains])
        total_n = unique_Kn.sum(axis=0)
        bad_n = (unique_Kn < 0.0).any(axis=0) | (total_n <= 0.0)
        epochs_n = columns["D"] / np.where(bad_n, 1.0, total_n)
        bad_n = bad_n | (epochs_n > MAX_EPOCHS)
        if bad_n.any():
            row = int(np.argmax(bad_n))
            raise UserError(
                f"{observations.place(row)} has D={columns['D'][row]:g} of pools "
                f"{', '.join(f'{p}={columns[p][row]:g}' for p in self.domains)}, and {self.name} "
                f"needs at least 0 of each, more in all, and up to {MAX_EPOCHS} epochs; mend or "
                f"drop it"
            )
        later_J = np.arange(1.0, max(2.0, np.ceil(epochs_n.max())))[:, None]
        ratio_Jn = np.log(np.clip(epochs_n, later_J, later_J + 1.0) / later_J)
        return np.log(np.minimum(columns["D"], total_n)), ratio_Jn, unique_Kn / total_n

    def predict(self, values: Values, prepared: Any) -> Predictions:
        """Return the loss [S, n]."""
        log_first_n, ratio_Jn, fraction_Kn = prepared
        epoch_J = np.arange(1, len(ratio_Jn) + 1)
        exponent = 0.0
        for pool, fraction_n in zip(self.domains, fraction_Kn, strict=True):
            b, tau = (np.asarray(values[f"{name}_{pool}"]) for name in ("b", "tau"))
            rate_Sn = np.log(2.0) * fraction_n / tau
            left = np.exp(-rate_Sn[..., None, :] * epoch_J[:, None])
            used_Sn = log_first_n - np.log(values["D0"]) + (left * ratio_Jn).sum(axis=-2)
            exponent = exponent - b * fraction_n * used_Sn
        return np.asarray(values["d"] + np.exp(exponent))


FORMS: tuple[Form, ...] = (QualityPools(),)
