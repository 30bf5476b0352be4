"""Final loss of a run from its own curve so far, under its own or another schedule."""

# n rows, T steps of the target, M memories

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allometry.configs.errors import UserError
from allometry.laws.forms.tissue import annealing
from allometry.laws.observations import LearningRates
from allometry.laws.posterior import ALPHAS, MEMORIES, Normal, Posterior, Prior, Rows, posterior

Array = NDArray[np.float64]

BINS = 200
"""Maximum number of rows to which the losses of a curve are averaged, evenly over its steps."""
FEWEST_ROWS = 20
SKIPPED, SKIPPED_OF_FEW = 0.25, 0.1
"""Shares of a curve, from its first step, that are left out even if the warm-up is shorter.

The second share applies if fewer than 20 rows would be left. A quarter was chosen by the final loss
of cosine runs of tiny models, forecast from their first 60 % and a constant run: off by 0.7 %, and
by 1.8 % with a tenth.
"""
UNKNOWN = 0.8
"""Ratio of a quantity's deviation to its prior's above which the quantity is unmeasured."""
LONG = 3.0
"""Longest extrapolation, as a ratio of steps, at which the law was checked."""

PUBLISHED = Prior(
    gain=Normal(0.05, 0.04),
    log_alpha=Normal(math.log(0.45), 0.6),
    log_memory=Normal(math.log(600.0), 1.0),
    level=Normal(0.7, 0.35),
    source="published curves of 25M to 400M parameters (arXiv 2503.12811) and tiny models",
)
"""Prior for curves without measured decay.

A complete decay gains 5 +- 4 % of the loss (3 to 4 % on the published curves, 10 % of tiny models);
alpha and memory of Tissue's law as fitted to the published curves.
"""

# Error of the law at measured final losses: as a share of the loss, increasing with each factor of
# e in steps (27 published curves), and as a share of the part of the gain that the run itself has
# not shown yet (published curves and tiny models).
_ERROR_NOW, _ERROR_PER_LOG_STEP, _ERROR_OF_GAIN = 0.001, 0.002, 0.2


@dataclass(frozen=True, slots=True)
class Curve:
    """Training losses at recorded steps [n], ascending, and the rate of every step of the run."""

    name: str
    steps_n: NDArray[np.int64]
    losses_n: Array
    rates: LearningRates


@dataclass(frozen=True, slots=True)
class Quality:
    """Quality of the fit, and quantities that the curve has measured.

    ``rows``: averaged rows, ``effective_rows`` independent ones; ``residual``: relative deviation
    of a row; ``persistence``: correlation of neighbouring residuals. ``unmeasured``: quantities
    known only from the prior, of ``alpha``, ``memory`` and ``gain`` (of the target's decay).
    ``gain``: mean and deviation, as a share of the last loss. ``at_edges``: probability at the ends
    of the searched ranges of alpha and memory.
    """

    rows: int
    effective_rows: float
    residual: float
    persistence: float
    unmeasured: tuple[str, ...]
    gain: Normal
    at_edges: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """Expected training loss of the last step: ``loss`` (median) and its interval.

    The interval includes the uncertainty of the fit to the rows, the prior's for unmeasured
    quantities, slow wandering of the curve, and the error of the law on published curves. The
    interval applies to the expected loss: a single step's loss scatters around it by the noise of a
    batch.
    """

    step: int
    total_steps: int
    loss: float
    low: float
    high: float
    level: float
    values: dict[str, float]
    quality: Quality
    prior: str
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def forecast(
    curves: Sequence[Curve], target: LearningRates, *, prior: Prior = PUBLISHED, level: float = 0.95
) -> Forecast:
    """Return the loss at ``target``'s last step, from the curves so far of one model.

    The first curve is the run's own. Losses after warm-up are averaged to at most 200 rows a curve
    and L = L0 + A·S1^−alpha − C·S2 (arXiv 2408.11029) is fitted to all curves together, see
    ``posterior``. If no learning rate has fallen yet, the gain of a decay is unmeasured: the
    prior's gain is used instead, with its full width in the interval and a warning. Raises
    UserError: a curve has fewer than 20 rows after its warm-up, or the target ends before the
    warm-up.
    """
    assert 0.0 < level < 1.0, level
    steps = len(target.rates)
    if steps <= target.warmup_steps:
        raise UserError(
            f"a run of {steps} steps ends within its warm-up of {target.warmup_steps}; ask for a "
            "longer one (--total-steps)"
        )
    rows = average(curves)
    end_s1, end_s2_M = _end(target)
    fitted_prior = _scaled(prior, target)
    estimate = posterior(rows, fitted_prior, end_s1, _reference(end_s2_M, rows, target))
    mean_AM, variance_AM = estimate.predict(end_s1, end_s2_M)
    now = int(curves[0].steps_n[-1])
    taken = curves[0].rates.rates[:now]
    known = steps >= now and np.allclose(taken, target.rates[:now], rtol=1e-6, atol=0.0)
    unseen = _unseen(curves, estimate, rows, end_s2_M) if known else 1.0
    variance_AM = variance_AM + _law_variance(estimate, steps / now, unseen)
    levels = (0.5 - level / 2, 0.5, 0.5 + level / 2)
    low, middle, high = _quantiles(estimate.probability_AM, mean_AM, variance_AM, levels)
    quality = _quality(estimate, rows, fitted_prior, bool(end_s2_M.any()))
    return Forecast(
        step=now,
        total_steps=steps,
        loss=middle,
        low=low,
        high=high,
        level=level,
        values=estimate.values(),
        quality=quality,
        prior=prior.source,
        warnings=tuple(_warnings(quality, prior, steps / now, known)),
    )


def average(curves: Sequence[Curve]) -> Rows:
    """Return the averaged rows of curves, without warm-up and first quarter (tenth, of few rows).

    Raises UserError: fewer than 20 rows of a curve are left.
    """
    losses, s1, s2, starts = [], [], [], [0]
    for curve in curves:
        for share in (SKIPPED, SKIPPED_OF_FEW):
            first = max(curve.rates.warmup_steps, int(share * int(curve.steps_n[-1])))
            kept = curve.steps_n > first
            if kept.sum() >= FEWEST_ROWS:
                break
        steps_n, losses_n = curve.steps_n[kept], curve.losses_n[kept]
        if len(steps_n) < FEWEST_ROWS:
            raise UserError(
                f"{curve.name} has {len(steps_n)} rows after step {first} (warm-up or first "
                f"tenth), and a forecast needs {FEWEST_ROWS}; wait for more steps or record more "
                "often (record.every_steps)"
            )
        number = min(BINS, len(steps_n))
        edges = np.arange(number + 1) * len(steps_n) // number
        counts = np.diff(edges)
        middle_n = np.rint(np.add.reduceat(steps_n, edges[:-1]) / counts).astype(np.int64)
        losses.append(np.add.reduceat(losses_n, edges[:-1]) / counts)
        s1.append(np.cumsum(curve.rates.rates)[middle_n - 1])
        s2.append(annealing(curve.rates, middle_n, MEMORIES) * MEMORIES[:, None])
        starts.append(starts[-1] + number)
    return Rows(
        np.concatenate(losses), np.concatenate(s1), np.concatenate(s2, axis=1), tuple(starts[:-1])
    )


def borrowed(curves: Sequence[Curve], target: LearningRates, name: str) -> Prior:
    """Return a prior for a decay such as the target's, measured on similar runs.

    The gain is that of the target's rates, scaled to the peak of the first curve, as a share of the
    loss; deviations are at least a fifth of the gain, a tenth of alpha and 0.3 in log memory,
    because the runs are different. Raises UserError: the rates of these runs never fell, so that
    they have not measured a gain either.
    """
    peak = float(curves[0].rates.rates.max()) / float(target.rates.max())
    scaled = LearningRates(target.rates * peak, target.warmup_steps)
    rows = average(curves)
    if not rows.s2_Mn.any():
        raise UserError(
            f"{name} has not lowered its learning rate, so it has measured no gain of a decay; "
            "give a run that has decayed (--like RUN)"
        )
    end_s1, end_s2_M = _end(scaled)
    reference_M = _reference(end_s2_M, rows, scaled)
    estimate = posterior(rows, _scaled(PUBLISHED, scaled), end_s1, reference_M)
    gain, alpha, memory = estimate.gain(), estimate.log_alpha(), estimate.log_memory()
    whole = max(_fall(target), 1e-3)
    return Prior(
        gain=Normal(gain.mean / whole, max(gain.sd, 0.2 * abs(gain.mean)) / whole),
        log_alpha=Normal(alpha.mean, max(alpha.sd, 0.1)),
        log_memory=Normal(memory.mean, max(memory.sd, 0.3)),
        level=PUBLISHED.level,
        source=name,
    )


def _end(target: LearningRates) -> tuple[float, Array]:
    """Return S1 and S2 [M] of the last step."""
    last = np.array([len(target.rates)])
    return float(target.rates.sum()), annealing(target, last, MEMORIES)[:, 0] * MEMORIES


def _fall(target: LearningRates) -> float:
    """Return the decrease of the target's rate, as a share of its peak."""
    return 1.0 - float(target.rates[-1]) / float(target.rates.max())


def _scaled(prior: Prior, target: LearningRates) -> Prior:
    """Return the prior with its gain scaled to the decrease of the target's rate."""
    share = _fall(target) or 1.0
    return replace(prior, gain=Normal(prior.gain.mean * share, prior.gain.sd * share))


def _reference(end_s2_M: Array, rows: Rows, target: LearningRates) -> Array:
    """Return the S2 [M] to which the prior's gain refers: the target's, or the rows' largest."""
    if (end_s2_M > 0.0).all():
        return end_s2_M
    return np.asarray(np.maximum(np.abs(rows.s2_Mn).max(axis=1), 1e-9 * float(target.rates.max())))


def _unseen(curves: Sequence[Curve], estimate: Posterior, rows: Rows, end_s2_M: Array) -> float:
    """Return the share of the target's annealing that the first curve has not reached."""
    if not end_s2_M.any():
        return 0.0
    last = (rows.starts[1] if len(curves) > 1 else len(rows.loss_n)) - 1
    seen_M = rows.s2_Mn[:, last] / np.where(end_s2_M == 0.0, 1.0, end_s2_M)
    return float(estimate.probability_AM.sum(axis=0) @ (1.0 - np.clip(seen_M, 0.0, 1.0)))


def _law_variance(estimate: Posterior, longer: float, unseen: float) -> float:
    """Return the variance of the smooth curve around the fitted law at the target's end."""
    share = _ERROR_NOW + _ERROR_PER_LOG_STEP * abs(math.log(longer))
    decay = _ERROR_OF_GAIN * unseen * abs(estimate.gain().mean)
    wandering = estimate.persistence * estimate.sd**2
    return estimate.scale**2 * (share**2 + decay**2 + wandering)


def _quantiles(
    p_AM: Array, mean_AM: Array, variance_AM: Array, levels: tuple[float, ...]
) -> tuple[float, ...]:
    """Return quantiles of a mixture of normal distributions."""
    from scipy.special import ndtr

    some = p_AM > 1e-7 * p_AM.max()
    p_C, mean_C, sd_C = p_AM[some], mean_AM[some], np.sqrt(variance_AM[some])
    grid = np.linspace((mean_C - 6.0 * sd_C).min(), (mean_C + 6.0 * sd_C).max(), 601)
    below = (p_C / p_C.sum()) @ ndtr((grid - mean_C[:, None]) / sd_C[:, None])
    return tuple(float(np.interp(level, below, grid)) for level in levels)


def _quality(estimate: Posterior, rows: Rows, prior: Prior, decays: bool) -> Quality:
    beliefs = {
        "alpha": (estimate.log_alpha(), prior.log_alpha),
        "memory": (estimate.log_memory(), prior.log_memory),
        "gain": (estimate.gain(), prior.gain),
    }
    unmeasured = tuple(
        name
        for name, (after, before) in beliefs.items()
        if after.sd > UNKNOWN * before.sd and (decays or name == "alpha")
    )
    p_A, p_M = estimate.probability_AM.sum(axis=1), estimate.probability_AM.sum(axis=0)
    edges = float(p_A[0] + p_A[-1]) + (float(p_M[0] + p_M[-1]) if decays else 0.0)
    assert len(p_A) == len(ALPHAS), p_A.shape
    return Quality(
        rows=len(rows.loss_n),
        effective_rows=estimate.effective_rows,
        residual=estimate.sd,
        persistence=estimate.persistence,
        unmeasured=unmeasured,
        gain=estimate.gain(),
        at_edges=edges,
    )


def _warnings(quality: Quality, prior: Prior, longer: float, continues: bool) -> list[str]:
    warnings = []
    if "gain" in quality.unmeasured:
        warnings.append(
            f"what the decay gains is hardly measured: {quality.gain.mean:.1%} +- "
            f"{quality.gain.sd:.1%} of the loss rests on the prior, from {prior.source}"
        )
    if "alpha" in quality.unmeasured:
        warnings.append(
            "the curve is too short or too noisy to tell how fast it flattens: its exponent is the "
            f"prior, from {prior.source}"
        )
    if longer > LONG:
        warnings.append(
            f"the target is {longer:.1f} times as long as what was seen; the law was checked up "
            f"to {LONG:g} times"
        )
    if longer < 1.0:
        warnings.append("the target is shorter than what was seen; rows past its end count as well")
    if not continues:
        warnings.append(
            "the target does not continue this run: it is the loss of another run with that "
            "schedule; on such the law was off by a fifth of what a decay gains"
        )
    if quality.at_edges > 0.1:
        warnings.append(
            f"{quality.at_edges:.0%} of the probability lies at the ends of the searched ranges "
            "of exponent and memory; take the interval as too narrow"
        )
    if quality.persistence > 0.8:
        warnings.append(
            "the curve wanders around the law for many rows together: it is no smooth power law, "
            "so be wary of the interval"
        )
    return warnings
