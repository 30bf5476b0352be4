"""Choice of data pools for a budget, by a law of quality and quantity (2404.07177)."""

# K pools, C candidates (sets of pools), n budgets, B bootstrap samples

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.fit.bootstrap import Bootstrap
from allometry.laws.forms.quality import MAX_EPOCHS, QualityPools
from allometry.laws.observations import Observations

Array = NDArray[np.float64]

ALL_SUBSETS = 12
"""Number of pools up to which all sets are compared, otherwise only the sets of the largest b."""
SCAN = 200
"""Number of budgets at which the best set is computed, to find its changes."""


@dataclass(frozen=True)
class Candidate:
    """A set of pools for training, all with the same number of epochs.

    ``tokens``: unique tokens of all its pools; ``shares``: share of each pool in the mixture.
    """

    pools: tuple[str, ...]
    shares: tuple[float, ...]
    tokens: float


@dataclass(frozen=True)
class PoolChoice:
    """Best set at a budget of ``tokens``, and the second best (None if there is no other set).

    ``interval``: of the loss; ``agree``: share of bootstrap samples with this best set. Both are
    None without samples.
    """

    tokens: float
    best: Candidate
    epochs: float
    loss: float
    interval: tuple[float, float] | None
    agree: float | None
    second: Candidate | None
    second_loss: float | None


def candidates(
    form: QualityPools, values: Mapping[str, float], sizes: Mapping[str, float]
) -> list[Candidate]:
    """Return the sets of pools to compare: all, or for more than twelve pools those of largest b.

    ``sizes``: unique tokens of each pool of the law.
    """
    pools = sorted(form.domains, key=lambda pool: -values[f"b_{pool}"])
    if len(pools) <= ALL_SUBSETS:
        sets = [one for k in range(1, len(pools) + 1) for one in combinations(pools, k)]
    else:
        sets = [tuple(pools[:k]) for k in range(1, len(pools) + 1)]
    found = []
    for chosen in sets:
        total = sum(sizes[pool] for pool in chosen)
        shares = tuple(sizes[pool] / total for pool in chosen)
        found.append(Candidate(chosen, shares, total))
    return found


def choose_pools(
    form: QualityPools,
    values: Mapping[str, float],
    sizes: Mapping[str, float],
    budgets: Sequence[float],
    bootstrap: Bootstrap | None = None,
    level: float = 0.95,
) -> list[PoolChoice]:
    """Return the best set of pools at each budget of tokens.

    Sets with more than ``MAX_EPOCHS`` epochs are not compared. Raises UserError: sizes are not
    those of the law's pools or not positive, or a budget exceeds ``MAX_EPOCHS`` epochs of all
    pools. For example,
    ``choose_pools(form, fit.values, {"a": 1e9, "b": 4e9}, [1e10])[0].best.pools``.
    """
    _check(form, sizes, budgets)
    compared, chosen = candidates(form, values, sizes), []
    for tokens in budgets:
        possible = [one for one in compared if tokens <= MAX_EPOCHS * one.tokens]
        if not possible:
            total = sum(sizes.values())
            raise UserError(
                f"a budget of {tokens:g} tokens reads all pools {tokens / total:g} times, and "
                f"{form.name} goes up to {MAX_EPOCHS} epochs; lower it"
            )
        rows = _rows(form, possible, sizes, tokens)
        prepared = form.prepare(rows)
        loss_C = np.asarray(form.predict(values, prepared), np.float64)
        order = np.argsort(loss_C, kind="stable").tolist()
        best, second = order[0], order[1] if len(order) > 1 else None
        interval = agree = None
        if bootstrap is not None and len(bootstrap):
            sampled_BC = np.broadcast_to(
                form.predict(bootstrap.values(), prepared), (len(bootstrap), len(possible))
            )
            agree = float(np.mean(np.argmin(sampled_BC, axis=1) == best))
            spread = bootstrap.spread(rows.take(np.arange(len(possible)) == best), level)
            interval = float(spread.low_n[0]), float(spread.high_n[0])
        chosen.append(
            PoolChoice(
                tokens=float(tokens),
                best=possible[best],
                epochs=float(tokens / possible[best].tokens),
                loss=float(loss_C[best]),
                interval=interval,
                agree=agree,
                second=None if second is None else possible[second],
                second_loss=None if second is None else float(loss_C[second]),
            )
        )
    return chosen


def pool_changes(
    form: QualityPools,
    values: Mapping[str, float],
    sizes: Mapping[str, float],
    low: float,
    high: float,
) -> list[tuple[float, tuple[str, ...], tuple[str, ...]]]:
    """Return the budgets between ``low`` and ``high`` at which the best set changes.

    Each with the sets before and after the change, to a precision of 1e-4. Two changes between
    neighbours of ``SCAN`` budgets, evenly spread over logs, are not found.
    """
    high = min(high, MAX_EPOCHS * sum(sizes.values()) * (1.0 - 1e-9))  # exp(log) may round up

    def best(log_tokens: float) -> tuple[str, ...]:
        tokens = float(np.exp(log_tokens))
        return choose_pools(form, values, sizes, [tokens])[0].best.pools

    return changes_of(best, low, high)


def changes_of(
    best: Callable[[float], tuple[str, ...]], low: float, high: float
) -> list[tuple[float, tuple[str, ...], tuple[str, ...]]]:
    """Return the changes of ``best``, a choice by the log of a budget, between two budgets."""
    if not low < high:
        return []
    logs = np.linspace(np.log(low), np.log(high), SCAN).tolist()
    chosen = [best(one) for one in logs]
    found = []
    for left, right, before, after in zip(logs, logs[1:], chosen, chosen[1:], strict=False):
        if before == after:
            continue
        start, end = left, right
        while end - start > 1e-4:
            middle = (start + end) / 2
            start, end = (middle, end) if best(middle) == before else (start, middle)
        found.append((float(np.exp((start + end) / 2)), before, best(end)))
    return found


def most_epochs(form: QualityPools, observations: Observations) -> float:
    """Return the largest number of epochs in the rows of a fit."""
    total_n = sum(observations[pool] for pool in form.domains)
    return float((observations["D"] / total_n).max())


def _rows(
    form: QualityPools, sets: Sequence[Candidate], sizes: Mapping[str, float], tokens: float
) -> Observations:
    columns = {
        pool: [sizes[pool] if pool in one.pools else 0.0 for one in sets] for pool in form.domains
    }
    return Observations.of({"D": [float(tokens)] * len(sets), **columns})


def _check(form: QualityPools, sizes: Mapping[str, float], budgets: Sequence[float]) -> None:
    if set(sizes) != set(form.domains):
        raise UserError(
            f"sizes are of {', '.join(sizes) or 'no pool'} and the law is of "
            f"{', '.join(form.domains)}; give one for each of its pools"
        )
    for name, value in (*sizes.items(), *(("tokens", one) for one in budgets)):
        if not (np.isfinite(value) and value > 0.0):
            raise UserError(f"{name}={value} must be a positive number of tokens")
