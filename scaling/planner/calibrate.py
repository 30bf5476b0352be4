"""From measured steps to constants, and to what a prediction with them is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from allometry.configs.errors import UserError
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import step_time

NOISE = 0.1  # log error of a measured step that the model is held to
ROWS_OF_SOURCE = 100  # what a source counts at most: its rows share its errors


@dataclass(frozen=True)
class Calibration:
    """Constants, and the covariance (K, K) of their logarithms that is left after the fit."""

    constants: Constants
    covariance: np.ndarray


def calibrate(
    cases: Cases,
    seconds: np.ndarray,
    sources: np.ndarray,
    prior: Calibration | None = None,
    noise: float = NOISE,
) -> Calibration:
    """Fit the constants to measured step times, (C,), of ``sources``, (C,).

    Least squares of logarithms with a soft loss beyond ``noise``, and a Gaussian belief about the
    logarithms of the constants: ``prior``, else the defaults' own. What no row says anything about
    stays at the belief. Raises UserError for times that are not positive.
    """
    if not (np.isfinite(seconds) & (seconds > 0)).all():
        raise UserError("measured step times must be positive numbers; leave other rows out")
    prior = prior or Calibration(Constants(), np.diag(Constants.spreads() ** 2))
    start = prior.constants.logs()
    whiten = np.linalg.cholesky(np.linalg.inv(prior.covariance)).T
    _, inverse, counts = np.unique(sources, return_inverse=True, return_counts=True)
    weight = np.sqrt(np.minimum(ROWS_OF_SOURCE / counts[inverse], 1)) / noise
    measured = np.log(seconds)

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.log(step_time(cases, Constants.of_logs(logs)).seconds) - measured

    def softened(logs: np.ndarray) -> np.ndarray:
        # Residuals whose squares are the soft loss, 2 s^2 (sqrt(1 + (r/s)^2) - 1), and the belief.
        scaled = errors(logs) / noise
        soft = np.sign(scaled) * np.sqrt(2 * (np.sqrt(1 + scaled**2) - 1))
        return np.concatenate([soft * weight * noise, whiten @ (logs - start)])

    found = least_squares(softened, start, method="trf", x_scale="jac", max_nfev=60)
    precision = found.jac.T @ found.jac
    return Calibration(Constants.of_logs(found.x), np.linalg.inv(precision))
