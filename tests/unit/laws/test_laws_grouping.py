"""Intervals with seeds of a cell grouped, if the law is slightly wrong in each cell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

LAW = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
TARGET = Observations.of({"N": [1e10], "D": [2e11]})
TRIALS = 100
"""A true 95 % interval covers 90 or more of them with probability 0.99."""


def covered(cell_spread: float, *, by_run: bool) -> int:
    """Count the 95 % intervals of a larger run's loss that cover the truth, of ``TRIALS``."""
    form = form_named("chinchilla")
    cells = [(size, ratio) for size in np.geomspace(1e7, 3e9, 6) for ratio in (5, 20, 80)]
    rows = [
        (size, ratio * size, f"{size} {ratio}", seed) for size, ratio in cells for seed in "abc"
    ]
    sizes, tokens = (np.array([row[i] for row in rows]) for i in (0, 1))
    groups = [f"{row[2]} {row[3]}" if by_run else row[2] for row in rows]
    columns = {"N": sizes, "D": tokens}
    exact = predict(form, LAW, Observations.of(columns))
    truth = float(predict(form, LAW, TARGET)[0])
    hits = 0
    for trial in range(TRIALS):
        random = np.random.default_rng(trial)
        off = np.repeat(cell_spread * random.standard_normal(len(cells)), 3)
        losses = exact * np.exp(off + 0.002 * random.standard_normal(len(rows)))
        observed = Observations.of({**columns, "loss": losses}, groups)
        found = replace(
            bootstrap(fit(form, observed, FitOptions(starts=32)), 100, seed=trial), form_error=None
        )
        low, high = found.predict_interval(TARGET)
        hits += bool(low[0] <= truth <= high[0])
    return hits


@pytest.mark.slow
def test_groups_of_cells_keep_intervals_honest_and_groups_of_runs_do_not() -> None:
    assert covered(0.003, by_run=False) >= 90
    assert covered(0.003, by_run=True) < 85, "runs of a cell are off together: they count thrice"


@pytest.mark.slow
def test_without_what_cells_share_both_hold() -> None:
    assert covered(0.0, by_run=False) >= 90
    assert covered(0.0, by_run=True) >= 90
