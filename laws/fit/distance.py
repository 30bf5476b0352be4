"""How far rows lie beyond those that a law was fitted to."""

# n rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allometry.laws.forms.base import Form
from allometry.laws.observations import Observations

Array = NDArray[np.float64]


def extents(form: Form, observations: Observations) -> dict[str, Array]:
    """Return what distances are measured along: the log of each positive input, and of 6 N D."""
    logs = {
        one.name: np.log(observations[one.name])
        for one in form.inputs
        if one.positive and one.name in observations.columns
    }
    if "N" in logs and "D" in logs:
        logs["6ND"] = np.log(6.0) + logs["N"] + logs["D"]
    return logs


def distance(form: Form, fitted: Observations, asked: Observations) -> Array:
    """Return how far [n] rows lie outside of the fitted ones: the largest natural log of a ratio.

    Of each positive input to its fitted range, and of 6 N D, which may leave its range while N and
    D are within theirs.
    """
    inside, outside_n = extents(form, fitted), np.zeros(len(asked))
    for name, at_n in extents(form, asked).items():
        if name in inside:
            low, high = float(inside[name].min()), float(inside[name].max())
            outside_n = np.maximum(outside_n, np.maximum(low - at_n, at_n - high))
    return outside_n


def far_axis(form: Form, observations: Observations) -> Array | None:
    """Return what grows towards predictions [n], by which folds are cut; None: the law has none.

    Compute (N D, or C), else one of N, D; of laws that read the loss, its fall. Laws of whole
    curves have none: their forecasts carry an error of their own (``laws/forecast.py``).
    """
    logs = extents(form, observations)
    if "step" in observations.columns and observations.curves:
        return None
    for name in ("6ND", "C", "N", "D"):
        if name in logs:
            return logs[name]
    return -logs["loss"] if "loss" in logs else None
