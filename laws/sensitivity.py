"""Sensitivity of the loss to the learning rate (arXiv 2309.14322, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping


def learning_rate_sensitivity(
    losses: Mapping[float, float], initial_loss: float, between: tuple[float, float] | None = None
) -> float:
    """Return the mean over learning rates of min(loss, ``initial_loss``) − best loss.

    ``losses``: final loss by learning rate, on a grid that is even in log rate; a loss that is not
    finite counts as ``initial_loss``. ``between``: range of rates, both ends included. For example,
    ``learning_rate_sensitivity({1e-3: 3.0, 2e-3: 3.2}, 10.8)``.
    """
    assert math.isfinite(initial_loss), initial_loss
    low, high = between or (0.0, math.inf)
    some = [loss for rate, loss in losses.items() if low <= rate <= high]
    assert some, ("no learning rate", between, sorted(losses))
    bounded = [min(loss, initial_loss) if math.isfinite(loss) else initial_loss for loss in some]
    best = min(bounded)
    return sum(loss - best for loss in bounded) / len(bounded)
