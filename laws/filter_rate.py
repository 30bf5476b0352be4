"""Share of a corpus to keep at a budget, by laws of the same loss at several kept shares."""

# C shares kept, B pairs of bootstrap samples

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from allometry.configs.errors import UserError
from allometry.laws.allocation import (
    FLOPS_PER_PARAMETER_TOKEN,
    Allocation,
    best_share,
    compute_optimal,
)
from allometry.laws.fit.store import StoredFit
from allometry.laws.pools import changes_of

PAIRS = 2000
"""Number of draws of a sample of each fit, for the probability of being best."""

PUBLISHED: Mapping[str, tuple[float, float]] = {
    "Nemotron-CC": (4e-5, 0.25),
    "RefinedWeb": (6e-3, 0.14),
}
"""BETR's best share in percent, ``k C^p`` of the FLOPs C (2507.12466): k and p by corpus."""


@dataclass(frozen=True)
class RateChoice:
    """Compute-optimal allocations of ``flops`` by each law, and the law of the least loss.

    ``chances``: probability of each law to be best, by bootstrap; None if a fit has no samples.
    """

    flops: float
    best: str
    optima: Mapping[str, Allocation]
    chances: Mapping[str, float] | None


def published_share(corpus: str, flops: float) -> float:
    """Return the published best share (0 to 1) of a corpus at these FLOPs."""
    factor, power = PUBLISHED[corpus]
    return float(factor * flops**power / 100.0)


def choose_rate(
    fits: Mapping[str, StoredFit],
    flops: float,
    per_token: float = FLOPS_PER_PARAMETER_TOKEN,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> RateChoice:
    """Return the one of ``fits`` of the loss by N and D with the least compute-optimal loss.

    The fits must predict the same loss: on the same held-out tokens, in the same unit. Raises
    UserError: a fit has no optimum at these FLOPs, or fewer than two fits are given.
    """
    if len(fits) < 2:
        raise UserError("one fit is no choice; give the fits of at least two shares kept")
    optima = {
        name: compute_optimal(one.fit, flops, per_token, bootstrap=one.bootstrap, level=level)
        for name, one in fits.items()
    }
    best = min(optima, key=lambda name: optima[name].loss)
    return RateChoice(float(flops), best, optima, _chances(fits, flops, per_token, seed))


def _chances(
    fits: Mapping[str, StoredFit], flops: float, per_token: float, seed: int
) -> dict[str, float] | None:
    draw, drawn = np.random.default_rng(seed), []
    for one in fits.values():
        if one.bootstrap is None or not len(one.bootstrap):
            return None
        losses = []
        for values_P in one.bootstrap.values_BP.tolist():
            values = dict(zip(one.bootstrap.names, values_P, strict=True))
            try:
                losses.append(best_share(one.fit.form, values, flops, per_token).loss)
            except UserError:  # a sample without an optimum, about which compute_optimal warns
                continue
        drawn.append(draw.choice(np.array(losses), PAIRS))
    best_B = np.argmin(np.stack(drawn), axis=0)
    return {name: float(np.mean(best_B == at)) for at, name in enumerate(fits)}


def rate_changes(
    fits: Mapping[str, StoredFit],
    low: float,
    high: float,
    per_token: float = FLOPS_PER_PARAMETER_TOKEN,
) -> list[tuple[float, str, str]]:
    """Return FLOPs between ``low`` and ``high`` at which the best fit changes, and both fits."""

    def best(log_flops: float) -> tuple[str, ...]:
        flops = float(np.exp(log_flops))
        losses = {
            name: best_share(one.fit.form, one.fit.values, flops, per_token).loss
            for name, one in fits.items()
        }
        return (min(losses, key=lambda name: losses[name]),)

    return [(at, before[0], after[0]) for at, before, after in changes_of(best, low, high)]
