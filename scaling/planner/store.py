"""File format of a calibration, for later planning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs import json_file
from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig
from allometry.scaling.planner.calibrate import GENERATIONS, Calibration
from allometry.scaling.planner.constants import Constants

DIGITS = 6
PUBLISHED = Path(__file__).parent / "published.json"


def _names() -> list[str]:
    own = [Constants.names()[index] for index in Constants.of_card()]
    return [*Constants.names(), *(f"{g}.{name}" for g in GENERATIONS for name in own)]


def to_json(belief: Calibration) -> dict[str, Any]:
    """Return the distribution as JSON, without the constants of its sources."""
    at = np.tril_indices(len(belief.mean))
    return {
        "names": _names(),
        "mean": belief.mean.round(DIGITS).tolist(),
        "covariance": belief.covariance[at].round(DIGITS + 2).tolist(),
        "scatter": [round(end, DIGITS) for end in belief.scatter],
        "kinds": sorted(list(kind) for kind in belief.kinds),
    }


def of_json(given: dict[str, Any], place: str) -> Calibration:
    """Return the distribution written by ``to_json``.

    Raises UserError, naming ``place``, if the data are not a calibration, or have other constants
    than the current cost model.
    """
    try:
        names, mean = given["names"], np.array(given["mean"], dtype=float)
        covariance = np.zeros((len(mean), len(mean)))
        covariance[np.tril_indices(len(mean))] = given["covariance"]
        low, high = given["scatter"]
        kinds = frozenset((a, b, c) for a, b, c in given["kinds"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{place} is no calibration of the planner ({type(error).__name__}: {error}); give a "
            "file that allometry plan --calibrate wrote"
        ) from error
    if names != _names():
        raise UserError(
            f"{place} is of another version of the cost model, whose constants differ; calibrate "
            "again"
        )
    whole = covariance + np.tril(covariance, -1).T
    # Rounding must not make the matrix indefinite in a well-determined direction.
    return Calibration(mean, whole + 1e-6 * np.eye(len(mean)), (low, high), kinds=kinds)


def save(belief: Calibration, path: Path) -> None:
    """Write a distribution as JSON."""
    path.write_text(json.dumps(to_json(belief)) + "\n", encoding="utf-8")


def load(path: Path) -> Calibration:
    """Read a distribution; raise UserError if the file is not a calibration."""
    try:
        given = json_file.read(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} cannot be read as a calibration ({why}); write one with allometry plan "
            f"--calibrate RUN --constants {path}"
        ) from error
    return of_json(given, str(path))


def published(hardware: HardwareConfig | None = None) -> Calibration:
    """Return the calibration on published measurements, for a framework not among them.

    If ``hardware`` has measured constants, they are used. An unknown card generation uses only
    these, since all published data are for GPUs. The data were created by ``benchmarks/planner.py
    --belief``; docs/planner_model.md describes the sources and the errors. Raises UserError if the
    hardware names an unknown constant.
    """
    if hardware is None:
        return load(PUBLISHED)
    if hardware.generation == "other":
        return Calibration.before(hardware)
    return load(PUBLISHED).with_own(hardware)
