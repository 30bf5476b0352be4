"""Share of a new domain in continual pretraining, by the D-CPT and CMR laws."""

# n shares, T horizons

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.mixing import Predictor, Sample
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

GENERAL_BOUND = 0.05
"""Allowed rise of the general loss in 2407.17467, in nats per token."""


@dataclass(frozen=True, slots=True)
class RatioChoice:
    """The largest share of the domain within the bound.

    ``bounded``: True if the bound limits the share, False if the largest requested share does.
    """

    share: float
    general_loss: float
    domain_loss: float
    bounded: bool


def choose_ratio(
    general: Predictor,
    domain: Predictor,
    *,
    at: Mapping[str, float],
    bound: float,
    low: float = 0.0,
    high: float = 1.0,
) -> RatioChoice:
    """Return the largest share of the domain that keeps the general loss at or below ``bound``.

    2406.01375, usage 1: ``general`` and ``domain`` are fits of a law that reads ``r``, the share of
    the corpus whose loss it predicts (``d_cpt``); ``at``: the other columns (N, D). For "at most 3
    % more general loss" ``bound`` is 1.03 times the initial loss. ``low`` and ``high`` limit the
    domain's share to the range of the fitted runs. Shares above a share that exceeds the bound are
    not considered, even if the law predicts a lower loss there. Raises UserError: the bound is
    exceeded at ``low``, or low and high are not a range of shares.
    """
    if not 0.0 <= low < high <= 1.0:
        raise UserError(f"low={low} and high={high} must be shares, 0 <= low < high <= 1")

    def general_loss(shares_n: Array) -> Array:
        return losses_at(general, 1.0 - shares_n, at)

    first, last = float(general_loss(np.array([low]))[0]), high
    if not first <= bound:
        raise UserError(
            f"the general loss is predicted as {first:.4f} with a domain share of {low:g}, above "
            f"bound={bound:.4f}; allow more or train on fewer tokens"
        )
    below, bounded = low, False
    for _ in range(8):  # each iteration narrows the range by 100
        shares_n = np.linspace(below, last, 101)
        over_n = ~(general_loss(shares_n) <= bound)  # NaN counts as above the bound
        if not over_n.any():
            below = last
            break
        crossing = int(np.argmax(over_n))
        below, last, bounded = float(shares_n[crossing - 1]), float(shares_n[crossing]), True
    share_1 = np.array([below])
    general_1, domain_1 = general_loss(share_1), losses_at(domain, share_1, at)
    return RatioChoice(below, float(general_1[0]), float(domain_1[0]), bounded)


def ratio_interval(
    general: Bootstrap,
    domain: Bootstrap,
    *,
    at: Mapping[str, float],
    bound: float,
    low: float = 0.0,
    high: float = 1.0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the interval of ``choose_ratio``'s share over samples of both fits.

    Samples that exceed the bound at ``low`` count as ``low``.
    """
    shares = []
    for index in range(min(len(general), len(domain))):
        laws = Sample(general, index), Sample(domain, index)
        share = low
        if losses_at(laws[0], 1.0 - np.array([low]), at)[0] <= bound:
            share = choose_ratio(*laws, at=at, bound=bound, low=low, high=high).share
        shares.append(share)
    tail = (1.0 - level) / 2.0
    least, most = np.quantile(shares, [tail, 1.0 - tail])
    return float(least), float(most)


def losses_at(law: Predictor, shares_n: Array, at: Mapping[str, float]) -> Array:
    """Return the loss [n] at these shares of the corpus whose loss the law predicts."""
    others = {name: np.full(len(shares_n), float(value)) for name, value in at.items()}
    return law.predict(Observations.of({**others, "r": shares_n}))


@dataclass(frozen=True, slots=True)
class CriticalShares:
    """Critical mixture ratios [T] by horizon.

    ``censored_T``: True if the largest share of the runs is within the bound, so that the ratio is
    at least this share.
    """

    tokens_T: Array
    shares_T: Array
    censored_T: NDArray[np.bool_]

    def observations(self) -> Observations:
        """Return rows (D, R) for ``cmr_critical``, without censored ratios."""
        kept_T = ~self.censored_T
        return Observations.of({"D": self.tokens_T[kept_T], "R": self.shares_T[kept_T]})


def critical_shares(
    general: Mapping[float, Predictor], tokens: Sequence[float], *, bound: float = GENERAL_BOUND
) -> CriticalShares:
    """Return the largest domain share whose general loss rises by at most ``bound``, per horizon.

    2407.17467: ``general`` has a fit of ``cmr_general`` for each domain share of the runs;
    ``tokens``: horizons. The rise is interpolated linearly between two shares. A fit of
    ``cmr_critical`` extrapolates the result. Raises UserError: there are fewer than two shares, a
    share is outside of [0, 1], or the smallest share exceeds the bound.
    """
    shares = sorted(general)
    if len(shares) < 2 or not (shares[0] >= 0.0 and shares[-1] <= 1.0):
        raise UserError(f"shares {shares} must be two or more between 0 and 1")
    tokens_T = np.asarray(tokens, np.float64)
    rows = Observations.of({"D": tokens_T})
    rise_nT = np.stack([general[share].predict(rows) for share in shares])
    critical_T, censored_T = [], []
    for tokens_seen, rise_n in zip(tokens_T, rise_nT.T, strict=True):
        over_n = ~(rise_n <= bound)
        if over_n[0]:
            raise UserError(
                f"the general loss is predicted to rise by {rise_n[0]:.4f} after "
                f"{tokens_seen:.3g} tokens at the least share, {shares[0]:g}, above "
                f"bound={bound:g}; add runs of smaller shares"
            )
        censored_T.append(not over_n.any())
        if not over_n.any():
            critical_T.append(shares[-1])
            continue
        i = int(np.argmax(over_n))
        part = (bound - rise_n[i - 1]) / (rise_n[i] - rise_n[i - 1])
        critical_T.append(shares[i - 1] + part * (shares[i] - shares[i - 1]))
    return CriticalShares(tokens_T, np.array(critical_T), np.array(censored_T))


def critical_mixture_ratio(critical: Predictor, tokens: float) -> float:
    """Return the critical mixture ratio for a horizon from a fit of ``cmr_critical``.

    Raises UserError: the law predicts a value outside of [0, 1], beyond its fitted horizons.
    """
    share = float(critical.predict(Observations.of({"D": [tokens]}))[0])
    if not 0.0 <= share <= 1.0:
        raise UserError(
            f"the law gives a critical share of {share:.3f} for {tokens:.3g} tokens, which is no "
            f"share; ask within the horizons that it was fitted to"
        )
    return share
