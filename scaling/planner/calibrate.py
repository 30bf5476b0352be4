"""Probability distribution of the cost model's constants, and prediction intervals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.machine import Generation, HardwareConfig
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.cost import step_time

NOISE = 0.08  # assumed log error of a modelled step
TIMED = 0.15
"""Standard deviation of the logarithm of a constant measured on parts of a step."""
NUDGE = 1e-4
BLOCK = 4096  # configurations per block, to fit a processor's cache
TARGETS = 500  # configurations whose variances choose_runs considers
NORMAL = 1.645  # quantile of a 90 % interval
GENERATIONS: tuple[str, ...] = get_args(Generation)


def logs_of(mean: Floats, cases: Cases) -> Floats:
    """Return log constants by configuration, (C, K): the common ones plus its card's deviation."""
    k, own = len(Constants.names()), Constants.of_card()
    logs = np.repeat(mean[None, :k], len(cases), axis=0)
    logs[:, own] += mean[k:].reshape(len(GENERATIONS), len(own))[_generations(cases)]
    return logs


def _generations(cases: Cases) -> Floats:
    return np.array([GENERATIONS.index(name) for name in cases.generation], dtype=int)


def errors(cases: Cases, logs_CK: Floats, measured: Floats) -> Floats:
    """Return log(predicted / measured seconds), (C,); ``measured`` are logarithms."""
    return np.log(step_time(cases, Constants.of_logs(logs_CK)).seconds) - measured


def slopes(cases: Cases, logs_CK: Floats) -> Floats:
    """Return derivatives of log time by the log constants, (C, K).

    Each constant is perturbed separately, for a block of configurations at once.
    """
    count, k = logs_CK.shape
    steps = np.concatenate([np.zeros((1, k)), NUDGE * np.eye(k)])
    found, each = np.empty((count, k)), max(BLOCK // (k + 1), 1)
    for start in range(0, count, each):
        part = np.arange(start, min(start + each, count))
        nudged = (logs_CK[part] + steps[:, None]).reshape(-1, k)
        said = step_time(cases.take(np.tile(part, k + 1)), Constants.of_logs(nudged)).seconds
        logs = np.log(said).reshape(k + 1, -1)
        found[part] = (logs[1:] - logs[0]).T / NUDGE
    return found


def by_mean(cases: Cases, slopes_CK: Floats) -> Floats:
    """Return the derivatives with respect to ``Calibration.mean``, (C, D)."""
    own = Constants.of_card()
    of_cards = np.zeros((len(cases), len(GENERATIONS), len(own)))
    of_cards[np.arange(len(cases)), _generations(cases)] = slopes_CK[:, own]
    return np.concatenate([slopes_CK, of_cards.reshape(len(cases), -1)], axis=1)


def soften(
    error: Floats, weight: Floats | float = 1.0, width: Floats | float = NOISE
) -> tuple[Floats, Floats]:
    """Return residuals whose squares are Cauchy's loss, and their derivatives.

    Near 0 residuals are errors over ``NOISE``; errors far beyond ``width`` have little influence:
    published tables contain runs that a fault made much slower than similar runs.
    """
    scaled = error / width
    soft = np.sign(scaled) * np.sqrt(np.log1p(scaled**2))
    near = np.abs(scaled) < 1e-6
    slope = np.where(near, 1.0, scaled / (1 + scaled**2) / np.where(near, 1.0, soft))
    return soft * (width / NOISE) * weight, slope / NOISE * weight


def check_seconds(seconds: Floats) -> None:
    """Raise UserError for times that are not positive and finite."""
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UserError("measured step times must be positive numbers; leave other rows out")


@dataclass(frozen=True)
class Calibration:
    """Gaussian distribution of the constants.

    ``mean``, (D,): logarithms of the constants, (K,), then for each of ``GENERATIONS`` the
    deviation of its cards (``Constants.of_card``). ``covariance``, (D, D): for an unknown
    framework, including its deviation. ``scatter``: 5 % and 95 % quantiles of log(measured /
    predicted time) of a source's runs, with the source's own constants. ``own``: deviation of each
    calibrated source, (K,). ``kinds``: kinds of the calibration data, as in ``Cases.kinds``.
    """

    mean: Floats
    covariance: Floats
    scatter: tuple[float, float] = (-2 * NOISE, 2 * NOISE)
    own: dict[str, Floats] = field(default_factory=dict)
    kinds: frozenset[tuple[str, str, str]] = frozenset()

    @classmethod
    def before(cls, hardware: HardwareConfig | None = None) -> Calibration:
        """Return the prior, before any measured step; constants given by the hardware are used.

        Raises UserError if the hardware names an unknown constant.
        """
        cards = np.tile(Constants.spreads("card")[Constants.of_card()], len(GENERATIONS))
        common = Constants.spreads("spread") ** 2 + Constants.spreads("between") ** 2
        variance = np.concatenate([common, cards**2])
        constants = Constants() if hardware is None else Constants.of_hardware(hardware)
        belief = cls(np.concatenate([constants.logs(), np.zeros(len(cards))]), np.diag(variance))
        return belief if hardware is None else belief.with_own(hardware)

    def with_own(self, hardware: HardwareConfig) -> Calibration:
        """Return the distribution with the constants measured on this hardware on parts of a step.

        Raises UserError if the hardware names an unknown constant.
        """
        logs = Constants.of_hardware(hardware).logs()
        mean, covariance = self.mean.copy(), self.covariance.copy()
        for index in np.flatnonzero(np.isin(Constants.names(), list(hardware.constants))):
            mean[index] = logs[index]
            covariance[index], covariance[:, index] = 0.0, 0.0
            covariance[index, index] = TIMED**2
        return replace(self, mean=mean, covariance=covariance)

    def of_source(self, name: str) -> Calibration:
        """Return the distribution for a calibrated source."""
        mean = self.mean.copy()
        mean[: len(self.own[name])] += self.own[name]
        return replace(self, mean=mean)

    def constants(self, generation: str) -> Constants:
        """Return the mean constants of a card generation."""
        k, own = len(Constants.names()), Constants.of_card()
        logs = self.mean[:k].copy()
        index = GENERATIONS.index(generation)
        logs[own] += self.mean[k:].reshape(len(GENERATIONS), len(own))[index]
        return Constants.of_logs(logs)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, (C,), with 90 % intervals; ``unseen``: no similar measurement exists."""

    seconds: Floats
    low: Floats
    high: Floats
    unseen: Floats


def predict(belief: Calibration, cases: Cases) -> Prediction:
    """Predict steps of a framework to which the distribution applies.

    An interval combines the uncertainty of the constants with the scatter of runs around the own
    constants of sources. ``unseen``: a card, precision or kind of model without calibration data.
    For example, ``predict(published(hardware), cases).seconds``.
    """
    logs = logs_of(belief.mean, cases)
    center = errors(cases, logs, np.zeros(len(cases)))
    slope = by_mean(cases, slopes(cases, logs))
    variance = np.einsum("cd,de,ce->c", slope, belief.covariance, slope)
    low, high = (np.sqrt(NORMAL**2 * variance + end**2) for end in belief.scatter)
    unseen = np.array([kind not in belief.kinds for kind in cases.kinds])
    return Prediction(np.exp(center), np.exp(center - low), np.exp(center + high), unseen)


def adapt(belief: Calibration, cases: Cases, seconds: Floats) -> Calibration:
    """Update a distribution with a few measured steps of one framework.

    At first only errors far beyond the prior uncertainty are down-weighted, at the end errors far
    beyond ``NOISE`` from the consensus of the other runs. For example,
    ``adapt(published(hardware), cases, seconds)`` with a few runs of one's own.
    """
    from scipy.optimize import least_squares  # imports take half a second, not needed in training

    check_seconds(seconds)
    measured, root = np.log(seconds), np.linalg.cholesky(belief.covariance)
    slope = by_mean(cases, slopes(cases, logs_of(belief.mean, cases)))
    possible = np.sqrt(np.einsum("cd,de,ce->c", slope, belief.covariance, slope) + NOISE**2)

    def residuals(z: Floats, width: Floats) -> Floats:
        logs = logs_of(belief.mean + root @ z, cases)
        return np.concatenate([soften(errors(cases, logs, measured), width=width)[0], z])

    def jacobian(z: Floats, width: Floats) -> Floats:
        logs = logs_of(belief.mean + root @ z, cases)
        soft = soften(errors(cases, logs, measured), width=width)[1][:, None]
        return np.concatenate([soft * by_mean(cases, slopes(cases, logs)) @ root, np.eye(len(z))])

    z = np.zeros(len(root))
    for width in (possible, np.sqrt(possible * NOISE), np.full(len(cases), NOISE)):
        found = least_squares(residuals, z, jacobian, max_nfev=40, args=(width,))
        z = found.x
    left = root @ np.linalg.inv(found.jac.T @ found.jac) @ root.T
    kinds = belief.kinds | frozenset(cases.kinds)
    return replace(belief, mean=belief.mean + root @ z, covariance=left, own={}, kinds=kinds)


def choose_runs(belief: Calibration, cases: Cases, count: int) -> list[int]:
    """Choose the configurations whose measurement reduces the uncertainty of all of them the most.

    The choice is greedy: each configuration maximally reduces the sum of log variances, for noise
    ``NOISE``.
    """
    slope = by_mean(cases, slopes(cases, logs_of(belief.mean, cases)))
    about = slope[:: -(-len(cases) // TARGETS)]
    covariance = belief.covariance
    chosen: list[int] = []
    for _ in range(min(count, len(cases))):
        own, theirs = (
            np.einsum("cd,de,ce->c", part, covariance, part) + NOISE**2 for part in (slope, about)
        )
        shared = (slope @ covariance @ about.T) ** 2 / (own[:, None] * theirs)
        gain = -np.log1p(-shared).sum(axis=1)
        gain[chosen] = -1
        best = int(np.argmax(gain))
        chosen.append(best)
        moved = covariance @ slope[best]
        covariance = covariance - np.outer(moved, moved) / own[best]
    return chosen
