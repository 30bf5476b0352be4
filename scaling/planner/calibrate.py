"""From measured steps to constants, and to what a prediction with them is worth."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants, Floats
from allometry.scaling.planner.cost import step_time

NOISE = 0.08  # log error of a step that the model is held to
ROWS_OF_SOURCE = 150  # what a source counts at most: its rows share their errors
TIMED = 0.15
"""Standard deviation of the logarithm of a constant that was measured on pieces of a step."""
NUDGE = 1e-4
NORMAL = 1.645  # of a 90 % interval


@dataclass(frozen=True)
class Calibration:
    """What is believed of the constants.

    ``covariance``, (K, K): of their logarithms for a framework not seen, its deviation included.
    ``scatter``: logarithms of measured over predicted time that a twentieth of a source's
    runs lie below, and above, with the source's own constants. ``of_source``: of each source
    that was calibrated on. ``kinds``: what was calibrated on, as ``Cases.kinds``.
    """

    constants: Constants
    covariance: Floats
    scatter: tuple[float, float] = (-2 * NOISE, 2 * NOISE)
    of_source: dict[str, Constants] = field(default_factory=dict)
    kinds: frozenset[tuple[str, str, str]] = frozenset()

    @classmethod
    def before(cls, hardware: HardwareConfig | None = None) -> Calibration:
        """The belief without any step's measurement; of hardware that has constants, these.

        Raises UserError for a constant of the hardware that is none.
        """
        variance = Constants.spreads() ** 2 + Constants.between() ** 2
        if hardware is None:
            return cls(Constants(), np.diag(variance))
        measured = np.isin(Constants.names(), list(hardware.constants))
        variance = np.where(measured, TIMED**2, variance)
        return cls(Constants.of_hardware(hardware), np.diag(variance))


def _check(seconds: Floats) -> None:
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UserError("measured step times must be positive numbers; leave other rows out")


def _errors(cases: Cases, logs: Floats, measured: Floats) -> Floats:
    return np.log(step_time(cases, Constants.of_logs(logs)).seconds) - measured


def _soft(errors: Floats, weight: float) -> tuple[Floats, Floats]:
    """Residuals whose squares are Cauchy's loss, and their derivatives.

    Published tables hold runs that some fault made many times slower than their neighbours: errors
    far beyond ``NOISE`` hardly pull.
    """
    scaled = errors / NOISE
    soft = np.sign(scaled) * np.sqrt(np.log1p(scaled**2))
    near = np.abs(scaled) < 1e-6
    slope = np.where(near, 1.0, scaled / (1 + scaled**2) / np.where(near, 1.0, soft))
    return soft * weight, slope / NOISE * weight


def _slopes(cases: Cases, logs: Floats, measured: Floats, at: Floats) -> Floats:
    """Derivatives of the errors by the logarithms, (C, K)."""
    steps = NUDGE * np.eye(len(logs))
    return np.stack([(_errors(cases, logs + s, measured) - at) / NUDGE for s in steps], axis=1)


def calibrate(cases: Cases, seconds: Floats, sources: Floats) -> Calibration:
    """Fit the constants to measured step times, (C,), of ``sources``, (C,).

    Least squares of logarithms with a loss that flattens beyond ``NOISE``. Constants have a value
    for each source around a common one: how far is believed of each (``Constants.between``), so
    that what is a framework's own stays its own. What no row says anything about stays at the
    belief. Raises UserError for times that are not positive.
    """
    _check(seconds)
    names = [str(name) for name in np.unique(sources)]
    parts = [np.flatnonzero(sources == name) for name in names]
    groups = [(cases.take(part), np.log(seconds[part])) for part in parts]
    weights = [float(np.sqrt(min(ROWS_OF_SOURCE / len(part), 1))) for part in parts]
    start, spread, between = Constants().logs(), Constants.spreads(), Constants.between()
    k = len(start)

    def split(x: Floats) -> tuple[Floats, Floats]:
        z = x.reshape(-1, k)
        return start + z[0] * spread, z[1:] * between

    def residuals(x: Floats) -> Floats:
        common, own = split(x)
        each = (
            _soft(_errors(part, common + deviation, measured), weight)[0]
            for (part, measured), weight, deviation in zip(groups, weights, own, strict=True)
        )
        return np.concatenate([*each, x])

    def jacobian(x: Floats) -> Floats:
        common, own = split(x)
        blocks = []
        for index, ((part, measured), weight) in enumerate(zip(groups, weights, strict=True)):
            logs = common + own[index]
            at = _errors(part, logs, measured)
            slope = _soft(at, weight)[1][:, None] * _slopes(part, logs, measured, at)
            block = np.zeros((len(part), len(x)))
            block[:, :k] = slope * spread
            block[:, (index + 1) * k : (index + 2) * k] = slope * between
            blocks.append(block)
        return np.concatenate([*blocks, np.eye(len(x))])

    found = least_squares(residuals, np.zeros(k * (1 + len(names))), jacobian, max_nfev=60)
    common, own = split(found.x)
    left = np.linalg.inv(found.jac.T @ found.jac)[:k, :k] * np.outer(spread, spread)
    ends = [
        np.quantile(-_errors(part, common + own[i], measured), (0.05, 0.95))
        for i, (part, measured) in enumerate(groups)
    ]
    low, high = np.mean(ends, axis=0)
    return Calibration(
        Constants.of_logs(common),
        left + np.diag(between**2),
        (float(low), float(high)),
        {name: Constants.of_logs(common + own[i]) for i, name in enumerate(names)},
        frozenset(cases.kinds),
    )


def adapt(belief: Calibration, cases: Cases, seconds: Floats) -> Calibration:
    """Update a belief by a few measured steps of one framework, each believed as it is."""
    _check(seconds)
    start, measured = belief.constants.logs(), np.log(seconds)
    root = np.linalg.cholesky(belief.covariance)

    def residuals(z: Floats) -> Floats:
        return np.concatenate([_errors(cases, start + root @ z, measured) / NOISE, z])

    def jacobian(z: Floats) -> Floats:
        logs = start + root @ z
        at = _errors(cases, logs, measured)
        slopes = _slopes(cases, logs, measured, at) / NOISE
        return np.concatenate([slopes @ root, np.eye(len(z))])

    found = least_squares(residuals, np.zeros(len(start)), jacobian, max_nfev=40)
    left = root @ np.linalg.inv(found.jac.T @ found.jac) @ root.T
    kinds = belief.kinds | frozenset(cases.kinds)
    constants = Constants.of_logs(start + root @ found.x)
    return Calibration(constants, left, belief.scatter, kinds=kinds)


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
    logs = belief.constants.logs()
    center = _errors(cases, logs, np.zeros(len(cases)))
    slopes = _slopes(cases, logs, np.zeros(len(cases)), center)
    variance = np.einsum("ck,kl,cl->c", slopes, belief.covariance, slopes)
    low, high = (np.sqrt(NORMAL**2 * variance + end**2) for end in belief.scatter)
    unseen = np.array([kind not in belief.kinds for kind in cases.kinds])
    return Prediction(np.exp(center), np.exp(center - low), np.exp(center + high), unseen)


def choose_runs(belief: Calibration, cases: Cases, count: int) -> list[int]:
    """Choose the configurations whose measurement says most about all of them.

    Greedy: each is the one that lowers the mean variance of the logarithms most, at ``NOISE``.
    """
    logs, zeros = belief.constants.logs(), np.zeros(len(cases))
    slopes = _slopes(cases, logs, zeros, _errors(cases, logs, zeros))
    covariance = belief.covariance
    chosen: list[int] = []
    whole = slopes.T @ slopes
    for _ in range(min(count, len(cases))):
        moved = slopes @ covariance
        own = np.einsum("ck,ck->c", moved, slopes) + NOISE**2
        gain = np.einsum("ck,kl,cl->c", moved, whole, moved) / own
        gain[chosen] = -1
        best = int(np.argmax(gain))
        chosen.append(best)
        covariance = covariance - np.outer(moved[best], moved[best]) / own[best]
    return chosen
