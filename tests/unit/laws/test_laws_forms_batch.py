"""Laws of batch, rates and parallel streams against identities and printed numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from allometry.laws.fit.engine import FitOptions, fit, predict
from allometry.laws.forms.batch import (
    CriticalBatch,
    StepsToLoss,
)
from allometry.laws.forms.hyperparameters import BatchLaw, LearningRateLaw
from allometry.laws.forms.parallel_scaling import stream_factor
from allometry.laws.observations import Observations
from allometry.scaling.hyperlaws import minicpm_batch, step_law


def test_steps_and_tokens_lie_on_a_hyperbola() -> None:
    values = {"S_min": 4000.0, "E_min": 1.6e9}
    batch = np.geomspace(1e3, 1e8, 9)
    steps = predict(StepsToLoss(), values, Observations.of({"B": batch}))
    tokens = batch * steps
    product = (steps / values["S_min"] - 1.0) * (tokens / values["E_min"] - 1.0)
    np.testing.assert_allclose(product, 1.0, rtol=1e-9)


def test_the_critical_batch_costs_twice_the_steps_and_twice_the_tokens() -> None:
    values = {"S_min": 4000.0, "E_min": 1.6e9}
    critical = values["E_min"] / values["S_min"]
    steps = predict(StepsToLoss(), values, Observations.of({"B": [critical]}))[0]
    assert steps == pytest.approx(2.0 * values["S_min"])
    assert steps * critical == pytest.approx(2.0 * values["E_min"])


def test_a_critical_batch_comes_out_of_noisy_steps() -> None:
    random = np.random.default_rng(0)
    batch = np.geomspace(2**12, 2**22, 11)
    steps = (4000.0 + 1.6e9 / batch) * np.exp(0.02 * random.standard_normal(11))
    found = fit(StepsToLoss(), Observations.of({"B": batch, "S": steps}), FitOptions(loss="square"))
    assert found.values["E_min"] / found.values["S_min"] == pytest.approx(4e5, rel=0.1)


def test_published_batches_and_rates_are_those_of_the_planner() -> None:
    losses = [2.2, 3.0, 4.5]
    rows = Observations.of({"loss": losses})
    minicpm = predict(CriticalBatch(), CriticalBatch.published["minicpm"], rows)
    np.testing.assert_allclose(minicpm, [minicpm_batch(loss) for loss in losses], rtol=1e-12)
    at = Observations.of({"N": [6e7, 1e9], "D": [4e9, 1e11]})
    rate = predict(LearningRateLaw(), LearningRateLaw.published["step_law"], at)
    batch = predict(BatchLaw(), BatchLaw.published["step_law"], at)
    for row in range(2):
        expected = step_law(at["N"][row], at["D"][row])
        assert (rate[row], batch[row]) == pytest.approx(expected, rel=1e-12)


def test_streams_are_worth_what_the_authors_page_prints() -> None:
    # https://parscale-parallel-scaling-law.hf.space: a 2.8B model with 4 streams equals 4.33B with
    # one, 3.4B with two and 2.38B with eight; k follows from the first.
    k = (4.33 / 2.8 - 1.0) / math.log(4.0)
    four = stream_factor(k, 4.0)
    assert 2.8 * four / stream_factor(k, 2.0) == pytest.approx(3.4, abs=0.01)
    assert 2.8 * four / stream_factor(k, 8.0) == pytest.approx(2.38, abs=0.01)
    assert stream_factor(k, 1.0) == 1.0
