"""Regret of a learning rate that was tuned at one size and is used at another size."""

# R learning rates, S seeds; losses_RS in nats per token, infinite for a run that diverged

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from allometry.laws.optimum import Sweep

LEVEL = 0.95
PERCENT = 0.5
"""Default bound of a regret, in percent of the loss at the size's own best rate."""
SHARE = 0.2
"""Bound of a regret as a share of the standard parameterization's regret."""

Interval = tuple[float, float]
Verdict = Literal["met", "missed", "undecided"]
Seeds = Sequence[int]

_NONE: Interval = (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class Regret:
    """Loss at the transferred rate minus loss at the size's own best rate.

    ``log2_lr``: the transferred rate. ``loss`` and ``best``: the mean losses over seeds at this
    rate and at the own optimum, nats per token; ``nats``: their difference, infinite if the runs at
    the transferred rate diverged; ``percent``: in percent of ``best``. Intervals of 95 % are over
    seeds, cut at 0, the minimum of a regret; NaN if unknown. ``problem``: the reason for an unknown
    regret (NaN).
    """

    log2_lr: float
    loss: float
    best: float
    nats: float
    percent: float
    nats_interval: Interval
    percent_interval: Interval
    problem: str | None = None

    @classmethod
    def unknown(cls, log2_lr: float, best: float, problem: str) -> Regret:
        """Return an unknown regret, with the transferred rate and the best loss."""
        return cls(log2_lr, math.nan, best, math.nan, math.nan, _NONE, _NONE, problem)

    def verdict(self, percent: float = PERCENT) -> Verdict:
        """Return "met" if the regret is at most ``percent`` of the loss, by its interval."""
        if self.nats == math.inf:
            return "missed"
        return verdict(self.percent_interval, percent)

    def describe(self) -> dict[str, Any]:
        """Return JSON, with null for non-finite numbers; ``diverged`` is True for infinity."""
        plain: dict[str, Any] = {"diverged": self.nats == math.inf}
        for name, value in asdict(self).items():
            if isinstance(value, tuple):
                plain[name] = [_finite(end) for end in value]
            else:
                plain[name] = _finite(value) if isinstance(value, float) else value
        return plain


def loss_at(sweep: Sweep, log2_lr: float, seeds: Seeds | None = None) -> float:
    """Return the mean loss over seeds (columns; None: all) at a rate between those of the sweep.

    By a parabola in log2 of the rate: up to a neighbour of the best point the parabola of the
    optimum, through the best point and its two neighbours; further out, between x_i and x_{i+1},
    the parabola through both and the next point towards the best one. All parabolas pass through
    the measured points. Infinite between two rates that diverged and above the largest rate if it
    diverged; NaN next to one rate that diverged and outside of the measured rates.
    """
    x = np.asarray(sweep.log2_lrs, np.float64)
    y = _means(sweep, seeds)
    if log2_lr > x[-1] and not math.isfinite(y[-1]):
        return math.inf
    if not x[0] <= log2_lr <= x[-1] or not np.isfinite(y).any() or len(x) < 3:
        return math.nan
    exact = np.flatnonzero(x == log2_lr)
    if len(exact):
        return float(y[exact[0]])
    right = int(np.searchsorted(x, log2_lr))
    between = y[right - 1 : right + 1]
    if not np.isfinite(between).all():
        return math.nan if np.isfinite(between).any() else math.inf
    middle = min(max(_middle(int(np.argmin(y)), right), 1), len(x) - 2)
    points, losses = x[middle - 1 : middle + 2], y[middle - 1 : middle + 2]
    if not np.isfinite(losses).all():  # the third point diverged: linear interpolation
        return float(np.interp(log2_lr, x[right - 1 : right + 1], between))
    return _parabola(points, losses, log2_lr)


def _middle(best: int, right: int) -> int:
    """Return the middle of the three points for the interval that ends at ``right``."""
    if right in (best, best + 1):  # next to the best point
        return best
    return right - 1 if right > best else right


def _parabola(x: NDArray[np.float64], y: NDArray[np.float64], at: float) -> float:
    (x0, x1, x2), (y0, y1, y2) = x, y
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return float(y0 + left * (at - x0) + (right - left) / (x2 - x0) * (at - x0) * (at - x1))


def regret(base: Sweep, target: Sweep) -> Regret:
    """Return the regret of the best rate of ``base`` at ``target``.

    Both have the same seeds (columns), in the same order: a seed determines initial values and the
    order of data at either size, and is left out of both. The interval is that of the jackknife
    with quantiles of Student's t (see ``jackknife``); it includes the uncertainty of the rates,
    because both optima are recomputed without each seed. For example,
    ``regret(transfer.sweep(64), transfer.sweep(256)).percent``.
    """
    number = base.losses_RS.shape[1]
    assert number == target.losses_RS.shape[1], "the same seeds at both"
    first, own = base.optimum(), target.optimum()
    if not first.interior:
        problem = f"the size that rates are carried from has no best one: {first.problem}"
        return Regret.unknown(first.log2_lr, own.loss, problem)
    at = loss_at(target, first.log2_lr)
    if not own.interior and not at == math.inf > own.loss:
        problem = f"the size has no best rate: {own.problem}"
        return Regret.unknown(first.log2_lr, own.loss, problem)
    if math.isnan(at):
        problem = (
            f"the rate 2^{first.log2_lr:.2f} that is carried over is not between rates that were "
            "tried, or beside one that diverged"
        )
        return Regret.unknown(first.log2_lr, own.loss, problem)
    nats, in_percent = at - own.loss, 100.0 / own.loss
    low, high = jackknife(lambda seeds: _nats(base, target, seeds), number, nats)
    low = low if math.isnan(low) else max(0.0, low)
    return Regret(
        log2_lr=first.log2_lr,
        loss=at,
        best=own.loss,
        nats=nats,
        percent=nats * in_percent,
        nats_interval=(low, high),
        percent_interval=(low * in_percent, high * in_percent),
    )


def regrets(sweeps: Mapping[int, Sweep]) -> dict[int, Regret]:
    """Return the regret of each size after the first, at the best rate of the first size."""
    base, *others = sweeps
    return {size: regret(sweeps[base], sweeps[size]) for size in others}


def against(
    ours: tuple[Sweep, Sweep], theirs: tuple[Sweep, Sweep], share: float = SHARE
) -> Verdict:
    """Return "met" if our regret (base, target) is at most ``share`` of theirs, by the seeds.

    The statistic is ours - share x theirs, with the interval of ``jackknife``. If theirs is
    infinite, any known and finite regret of ours is "met".
    """
    own, other = regret(*ours), regret(*theirs)
    if own.nats == math.inf:
        return "undecided" if other.problem or other.nats == math.inf else "missed"
    if other.nats == math.inf:
        return "undecided" if own.problem else "met"

    def difference(seeds: Seeds | None) -> float:
        return _nats(*ours, seeds) - share * _nats(*theirs, seeds)

    number = ours[0].losses_RS.shape[1]
    assert number == theirs[0].losses_RS.shape[1], "the same seeds of both"
    return verdict(jackknife(difference, number, difference(None)), 0.0)


def verdict(interval: Interval, bound: float) -> Verdict:
    """Return "met" if a quantity with this interval is at most ``bound``, or "undecided"."""
    low, high = interval
    if high <= bound:
        return "met"
    return "missed" if low > bound else "undecided"


def jackknife(
    statistic: Callable[[Seeds], float], number: int, whole: float, level: float = LEVEL
) -> Interval:
    """Return the interval of a statistic of ``number`` seeds, whose value over all is ``whole``.

    θ ± t_{n-1} √((n-1)/n Σ (θ_i - mean θ_i)²), with θ_i the statistic without seed i (Efron and
    Tibshirani 1993, chapter 11; quantile of Student's t as in Tukey 1958). (NaN, NaN) with fewer
    than two seeds, or if a value of the statistic is not finite. For example,
    ``jackknife(lambda seeds: float(x[list(seeds)].mean()), len(x), x.mean())``.
    """
    if number < 2:
        return _NONE
    without = [
        statistic([seed for seed in range(number) if seed != left]) for left in range(number)
    ]
    if not np.isfinite([whole, *without]).all():
        return _NONE
    error = math.sqrt((number - 1) * float(np.var(without)))
    reach = float(student.ppf((1.0 + level) / 2.0, number - 1)) * error
    return whole - reach, whole + reach


def _nats(base: Sweep, target: Sweep, seeds: Seeds | None) -> float:
    """Return the regret of some seeds; NaN if unknown."""
    first, own = base.optimum(seeds), target.optimum(seeds)
    if not (first.interior and own.interior):
        return math.nan
    return loss_at(target, first.log2_lr, seeds) - own.loss


def _means(sweep: Sweep, seeds: Seeds | None) -> NDArray[np.float64]:
    chosen = sweep.losses_RS if seeds is None else sweep.losses_RS[:, list(seeds)]
    means = chosen.mean(axis=1)
    return np.where(np.isfinite(means), means, np.inf)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
