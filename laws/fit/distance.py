"""Distance of rows from the fitted range of a law."""

# n: rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

Array = NDArray[np.float64]


def extents(form: Form, observations: Observations) -> dict[str, Array]:
    """Return the axes of distances: the log of each positive input, and of 6 N D."""
    logs = {
        one.name: np.log(observations[one.name])
        for one in form.inputs
        if one.positive and one.name in observations.columns
    }
    if "N" in logs and "D" in logs:
        logs["6ND"] = np.log(6.0) + logs["N"] + logs["D"]
    return logs


def distance(form: Form, fitted: Observations, asked: Observations) -> Array:
    """Return the distance [n] of rows from the fitted range: the largest natural log of a ratio.

    The maximum over each positive input and over 6 N D, which may leave its range while N and D are
    within theirs.
    """
    inside, outside_n = extents(form, fitted), np.zeros(len(asked))
    for name, at_n in extents(form, asked).items():
        if name in inside:
            low, high = float(inside[name].min()), float(inside[name].max())
            outside_n = np.maximum(outside_n, np.maximum(low - at_n, at_n - high))
    return outside_n


def far_axis(form: Form, observations: Observations) -> Array | None:
    """Return the quantity [n] along which folds are cut, increasing towards predictions, or None.

    Training compute (N D, or C), else N or D; for laws that read the loss, its decrease. Laws of
    complete curves have none: their forecasts have an error of their own (``laws/forecast.py``).
    """
    logs = extents(form, observations)
    if "step" in observations.columns and observations.curves:
        return None
    for name in ("6ND", "C", "N", "D"):
        if name in logs:
            return logs[name]
    return -logs["loss"] if "loss" in logs else None
