"""Numbers and observations as strict JSON: exact, with strings for numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from allometry.laws.observations import LearningRates, Observations


def plain_number(value: float) -> float | str:
    """Return the number, or ``"nan"``, ``"inf"``, ``"-inf"`` for JSON; ``float`` reads all."""
    return float(value) if np.isfinite(value) else str(float(value))


def plain_numbers(values: Any) -> list[float | str]:
    """Return a list of ``plain_number`` of an array."""
    return [plain_number(value) for value in np.asarray(values, np.float64).tolist()]


def observations_to_json(observations: Observations) -> dict[str, Any]:
    """Return plain values, from which ``observations_from_json`` creates equal rows."""
    return {
        "columns": {name: plain_numbers(values) for name, values in observations.columns.items()},
        "groups": list(observations.groups),
        "curves": {
            name: {"rates": plain_numbers(curve.rates), "warmup_steps": curve.warmup_steps}
            for name, curve in observations.curves.items()
        },
        "conventions": dict(observations.conventions),
    }


def observations_from_json(data: Mapping[str, Any]) -> Observations:
    """Return the observations of ``observations_to_json``."""
    return Observations(
        {name: np.array(column, np.float64) for name, column in data["columns"].items()},
        tuple(data["groups"]),
        {
            name: LearningRates(np.array(curve["rates"], np.float64), curve["warmup_steps"])
            for name, curve in data["curves"].items()
        },
        dict(data["conventions"]),
    )
