"""What is believed of the cost model's constants, and what a prediction with it is worth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from allometry.configs.errors import UserError
from allometry.configs.machine import Generation, HardwareConfig
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.cost import step_time

NOISE = 0.08  # log error of a step that the model is held to
TIMED = 0.15
"""Standard deviation of the logarithm of a constant that was measured on pieces of a step."""
NUDGE = 1e-4
BLOCK = 4096  # configurations at once, which a processor's cache takes
TARGETS = 500  # configurations that choose_runs looks at the variances of
NORMAL = 1.645  # of a 90 % interval
GENERATIONS: tuple[str, ...] = get_args(Generation)


def logs_of(mean: Floats, cases: Cases) -> Floats:
    """Logarithms of each configuration's constants, (C, K): the common ones and its card's."""
    k, own = len(Constants.names()), Constants.of_card()
    logs = np.repeat(mean[None, :k], len(cases), axis=0)
    logs[:, own] += mean[k:].reshape(len(GENERATIONS), len(own))[_generations(cases)]
    return logs


def _generations(cases: Cases) -> Floats:
    return np.array([GENERATIONS.index(name) for name in cases.generation], dtype=int)


def errors(cases: Cases, logs_CK: Floats, measured: Floats) -> Floats:
    """Logarithms of predicted over measured seconds, (C,); ``measured``: logarithms."""
    return np.log(step_time(cases, Constants.of_logs(logs_CK)).seconds) - measured


def slopes(cases: Cases, logs_CK: Floats) -> Floats:
    """Derivatives of the logarithm of the time by those of the constants, (C, K).

    Each constant is nudged alone, a block of configurations with all of their nudges at once.
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
    """The same derivatives by what ``Calibration.mean`` holds, (C, D)."""
    own = Constants.of_card()
    of_cards = np.zeros((len(cases), len(GENERATIONS), len(own)))
    of_cards[np.arange(len(cases)), _generations(cases)] = slopes_CK[:, own]
    return np.concatenate([slopes_CK, of_cards.reshape(len(cases), -1)], axis=1)


def soften(
    error: Floats, weight: Floats | float = 1.0, width: Floats | float = NOISE
) -> tuple[Floats, Floats]:
    """Residuals whose squares are Cauchy's loss, and their derivatives.

    Near 0 they are errors over ``NOISE``; errors far beyond ``width`` hardly pull: published tables
    hold runs that some fault made many times slower than their neighbours.
    """
    scaled = error / width
    soft = np.sign(scaled) * np.sqrt(np.log1p(scaled**2))
    near = np.abs(scaled) < 1e-6
    slope = np.where(near, 1.0, scaled / (1 + scaled**2) / np.where(near, 1.0, soft))
    return soft * (width / NOISE) * weight, slope / NOISE * weight


def check_seconds(seconds: Floats) -> None:
    """Raise UserError for times that are none."""
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UserError("measured step times must be positive numbers; leave other rows out")


@dataclass(frozen=True)
class Calibration:
    """What is believed of the constants.

    ``mean``, (D,): logarithms of the constants, (K,), then for each of ``GENERATIONS`` how far a
    card of it lies from them (``Constants.of_card``). ``covariance``, (D, D): for a framework not
    seen, its deviation included. ``scatter``: logarithms of measured over predicted time that a
    twentieth of a source's runs lie below, and above, with the source's own constants. ``own``:
    each calibrated source's deviation, (K,). ``kinds``: what was calibrated on, as ``Cases.kinds``.
    """

    mean: Floats
    covariance: Floats
    scatter: tuple[float, float] = (-2 * NOISE, 2 * NOISE)
    own: dict[str, Floats] = field(default_factory=dict)
    kinds: frozenset[tuple[str, str, str]] = frozenset()

    @classmethod
    def before(cls, hardware: HardwareConfig | None = None) -> Calibration:
        """The belief without any step's measurement; of hardware that has constants, these.

        Raises UserError for a constant of the hardware that is none.
        """
        cards = np.tile(Constants.spreads("card")[Constants.of_card()], len(GENERATIONS))
        common = Constants.spreads("spread") ** 2 + Constants.spreads("between") ** 2
        variance = np.concatenate([common, cards**2])
        constants = Constants() if hardware is None else Constants.of_hardware(hardware)
        belief = cls(np.concatenate([constants.logs(), np.zeros(len(cards))]), np.diag(variance))
        return belief if hardware is None else belief.with_own(hardware)

    def with_own(self, hardware: HardwareConfig) -> Calibration:
        """The belief with the constants that were measured on this hardware, on pieces of a step.

        Raises UserError for a constant of the hardware that is none.
        """
        logs = Constants.of_hardware(hardware).logs()
        mean, covariance = self.mean.copy(), self.covariance.copy()
        for index in np.flatnonzero(np.isin(Constants.names(), list(hardware.constants))):
            mean[index] = logs[index]
            covariance[index], covariance[:, index] = 0.0, 0.0
            covariance[index, index] = TIMED**2
        return replace(self, mean=mean, covariance=covariance)

    def of_source(self, name: str) -> Calibration:
        """The belief of a source that was calibrated on."""
        mean = self.mean.copy()
        mean[: len(self.own[name])] += self.own[name]
        return replace(self, mean=mean)

    def constants(self, generation: str) -> Constants:
        """The constants of a card of this generation."""
        k, own = len(Constants.names()), Constants.of_card()
        logs = self.mean[:k].copy()
        index = GENERATIONS.index(generation)
        logs[own] += self.mean[k:].reshape(len(GENERATIONS), len(own))[index]
        return Constants.of_logs(logs)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, (C,), the ends of 90 % intervals, and where nothing alike was measured."""

    seconds: Floats
    low: Floats
    high: Floats
    unseen: Floats


def predict(belief: Calibration, cases: Cases) -> Prediction:
    """Predict steps of a framework that the belief is of.

    An interval joins what is uncertain of the constants with the scatter of runs around sources'
    own constants. ``unseen``: a card, precision or kind of model that no calibration has measured.
    """
    logs = logs_of(belief.mean, cases)
    center = errors(cases, logs, np.zeros(len(cases)))
    slope = by_mean(cases, slopes(cases, logs))
    variance = np.einsum("cd,de,ce->c", slope, belief.covariance, slope)
    low, high = (np.sqrt(NORMAL**2 * variance + end**2) for end in belief.scatter)
    unseen = np.array([kind not in belief.kinds for kind in cases.kinds])
    return Prediction(np.exp(center), np.exp(center - low), np.exp(center + high), unseen)


def adapt(belief: Calibration, cases: Cases, seconds: Floats) -> Calibration:
    """Update a belief by a few measured steps of one framework.

    At first only what lies far beyond what the belief holds for possible hardly pulls, in the end
    what lies far beyond ``NOISE`` from what the other runs agree on.
    """
    from scipy.optimize import least_squares  # half a second that a training run need not pay

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
    """Choose the configurations whose measurement says most about all of them.

    Greedy: each is the one that lowers the logarithms of their variances most, at ``NOISE``.
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
