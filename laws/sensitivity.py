"""How much a wrong learning rate costs (arXiv 2309.14322, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from allometry.configs.errors import UserError
from allometry.laws.runs import read_run

GRID = (3e-4, 3e-1)
"""The learning rates between which the paper averages."""


def learning_rate_sensitivity(
    losses: Mapping[float, float], initial_loss: float, between: tuple[float, float] | None = None
) -> float:
    """Return the mean over learning rates of min(loss, ``initial_loss``) − best loss.

    ``losses``: final loss by learning rate, on a grid that is even in log rate; one that is not
    finite counts as ``initial_loss``. ``between``: only these rates, both ends included.
    """
    assert math.isfinite(initial_loss), initial_loss
    low, high = between or (0.0, math.inf)
    some = [loss for rate, loss in losses.items() if low <= rate <= high]
    assert some, ("no learning rate", between, sorted(losses))
    bounded = [min(loss, initial_loss) if math.isfinite(loss) else initial_loss for loss in some]
    best = min(bounded)
    return sum(loss - best for loss in bounded) / len(bounded)


def sweep_sensitivity(
    folders: Iterable[str | Path], between: tuple[float, float] | None = None
) -> float:
    """Return the sensitivity of a sweep of runs that differ in ``optimizer.lr`` alone.

    A run's final loss is the mean of the last tenth of its recorded steps; the initial loss is the
    mean of the runs' first ones. A run that ended because its loss was not finite counts as
    diverged. Raises UserError if two runs have the same learning rate, or none lies in ``between``.
    """
    losses: dict[float, float] = {}
    first = []
    for folder in folders:
        run = read_run(folder)
        rate = float(run.config["optimizer"]["lr"])
        if rate in losses:
            raise UserError(
                f"{folder} has optimizer.lr={rate}, as another run of the sweep; give one run of "
                "each learning rate"
            )
        curve = run.metrics["loss"]
        first.append(float(curve[0]))
        last = max(1, len(curve) // 10)
        broken = any(event.get("event") == "not_finite" for event in run.events[-1:])
        losses[rate] = math.nan if broken else float(curve[-last:].mean())
    low, high = between or (0.0, math.inf)
    if not any(low <= rate <= high for rate in losses):
        raise UserError(f"no run of the sweep has a learning rate between {low} and {high}")
    return learning_rate_sensitivity(losses, sum(first) / len(first), between)
