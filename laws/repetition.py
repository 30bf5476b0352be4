"""Fitting and using laws of repeated data: two stages, and the best epochs for a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.fit.engine import Fit, FitOptions, fit
from allometry.laws.forms.base import Form
from allometry.laws.forms.repetition import DataConstrainedTied, TiedPower
from allometry.laws.observations import Observations


@dataclass(frozen=True, slots=True)
class TwoStages:
    """``unique``: E, A, B and alpha from runs that repeat nothing; ``repeated``: R_D and R_N, the
    others fixed, from all runs. ``repeated`` predicts."""

    unique: Fit
    repeated: Fit


def fit_in_two_stages(
    observations: Observations, options: FitOptions | None = None, *, max_epochs: float = np.inf
) -> TwoStages:
    """Fit the data-constrained law as 2305.16264 does: first unique data, then repetition.

    Columns N, D (tokens seen), U (unique tokens available) and loss. ``max_epochs`` leaves out of
    the second stage runs with more, which may have diverged. Raises UserError if too few rows
    repeat nothing, or no row repeats.
    """
    options = options or FitOptions()
    epochs_n = observations["D"] / observations["U"]
    once_n = epochs_n <= 1.0
    kept_n = epochs_n <= max_epochs
    least = len(TiedPower.parameters)
    if once_n.sum() < least or not (kept_n & ~once_n).any():
        raise UserError(
            f"{int(once_n.sum())} rows have D <= U and {int((kept_n & ~once_n).sum())} of the "
            f"others have up to {max_epochs:g} epochs; the two stages need at least {least} and 1: "
            f"add runs or fit data_constrained at once"
        )
    unique = fit(TiedPower(), observations.take(once_n), options)
    fixed = {name: unique.values[name] for name in ("E", "A", "B", "alpha")}
    repeated = fit(DataConstrainedTied(), observations.take(kept_n), replace(options, fixed=fixed))
    return TwoStages(unique, repeated)


@dataclass(frozen=True, slots=True)
class Repetition:
    """The best use of a compute budget on limited data: N, D = epochs times U, and the loss."""

    parameters: float
    tokens: float
    epochs: float
    loss: float


def best_repetition(
    form: Form,
    values: Mapping[str, float],
    unique_tokens: float,
    flops: float,
    flops_per_parameter_token: float = 6.0,
) -> Repetition:
    """Return the N and D of the least predicted loss with ``flops`` = 6 N D and U unique tokens.

    ``form``: one that reads N, D and U. Up to 10,000 epochs are considered. Raises UserError if a
    budget is not a positive number.
    """
    for name, value in (("unique_tokens", unique_tokens), ("flops", flops)):
        if not (np.isfinite(value) and value > 0.0):
            raise UserError(f"{name}={value} must be a positive number")
    low, high = np.log(unique_tokens * 1e-4), np.log(unique_tokens * 1e4)
    for _ in range(5):  # each round narrows the range by 100
        tokens_n = np.exp(np.linspace(low, high, 201))
        size_n = flops / (flops_per_parameter_token * tokens_n)
        unique_n = np.full(len(tokens_n), unique_tokens)
        rows = Observations.of({"N": size_n, "D": tokens_n, "U": unique_n})
        loss_n = np.asarray(form.predict(values, form.prepare(rows)))
        best = int(np.argmin(loss_n))
        low, high = (np.log(tokens_n[max(best - 1, 0)]), np.log(tokens_n[min(best + 1, 200)]))
    size, tokens, loss = (float(values_n[best]) for values_n in (size_n, tokens_n, loss_n))
    return Repetition(size, tokens, tokens / unique_tokens, loss)
