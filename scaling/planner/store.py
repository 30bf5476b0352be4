"""A belief as a file: what a calibration found, to plan with later."""

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
    """Return the belief as JSON, without its sources' own constants."""
    at = np.tril_indices(len(belief.mean))
    return {
        "names": _names(),
        "mean": belief.mean.round(DIGITS).tolist(),
        "covariance": belief.covariance[at].round(DIGITS + 2).tolist(),
        "scatter": [round(end, DIGITS) for end in belief.scatter],
        "kinds": sorted(list(kind) for kind in belief.kinds),
    }


def of_json(given: dict[str, Any], place: str) -> Calibration:
    """Return the belief that ``to_json`` wrote.

    Raises UserError, naming ``place``, where it is none, or one of other constants than today's.
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
    # Rounding must not make a certain direction of it less than certain.
    return Calibration(mean, whole + 1e-6 * np.eye(len(mean)), (low, high), kinds=kinds)


def save(belief: Calibration, path: Path) -> None:
    """Write a belief as JSON."""
    path.write_text(json.dumps(to_json(belief)) + "\n", encoding="utf-8")


def load(path: Path) -> Calibration:
    """Read a belief. Raises UserError where there is none."""
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
    """Return the belief that published measurements leave of a framework not among them.

    Of ``hardware`` that has constants of its own these; of a generation of cards that is none of
    the known ones nothing but these, as all that was published is of GPUs.
    ``benchmarks/planner.py --belief`` made it; docs/planner_model.md says from what, and how far it
    errs. Raises UserError for a constant of the hardware that is none.
    """
    if hardware is None:
        return load(PUBLISHED)
    if hardware.generation == "other":
        return Calibration.before(hardware)
    return load(PUBLISHED).with_own(hardware)
