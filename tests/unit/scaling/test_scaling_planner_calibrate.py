"""Calibration of the planner: constants that made the times are found, and faults are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.machine import load_hardware
from allometry.scaling.planner.calibrate import (
    Calibration,
    adapt,
    calibrate,
    choose_runs,
    predict,
)
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import step_time

MODEL = {
    **{"layers": 24, "width": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "ffn": 8192},
    **{"vocab": 50304, "sequence": 2048, "global_batch": 256, "hardware": "a100", "eager": 1},
}
TRUTH = replace(Constants(), products=0.85, launch_eager_s=3e-3, inside_latency=2.0)


def grid() -> Cases:
    rows = [
        MODEL | {"micro_batch": m, "tp": t, "pp": p, "dp": 8 // (t * p)}
        for m in (1, 4, 16)
        for t in (1, 2, 4, 8)
        for p in (1, 2, 4)
        if t * p <= 8
    ]
    return Cases.of(rows, {"a100": load_hardware("a100")})


def test_times_of_known_constants_are_predicted_where_a_tenth_are_faults() -> None:
    cases, generator = grid(), np.random.default_rng(0)
    clean = step_time(cases, TRUTH).seconds
    seconds = clean * np.exp(0.02 * generator.standard_normal(len(clean)))
    seconds[::10] *= 20
    sources = np.full(len(cases), "one")
    before = np.abs(np.log(step_time(cases).seconds / clean)).max()
    found = calibrate(cases, seconds, sources)
    own = np.abs(np.log(step_time(cases, found.of_source["one"]).seconds / clean))
    assert before > 0.2
    assert own.max() < 0.06
    assert found.of_source["one"].launch_eager_s == pytest.approx(3e-3, rel=0.15)
    # What no row speaks of stays where it was.
    assert found.constants.experts_bandwidth == pytest.approx(Constants().experts_bandwidth)


def test_three_runs_bring_a_framework_of_its_own_near() -> None:
    cases, belief = grid(), Calibration.before()
    truth = step_time(cases, TRUTH).seconds
    chosen = choose_runs(belief, cases, 3)
    assert len(set(chosen)) == 3
    own = adapt(belief, cases.take(np.array(chosen)), truth[chosen])
    before, after = (predict(b, cases) for b in (belief, own))
    error = [np.median(np.abs(truth / p.seconds - 1)) for p in (before, after)]
    assert error[1] < 0.05 < error[0]
    assert (np.log(after.high / after.low) <= np.log(before.high / before.low) + 1e-9).all()
    assert ((before.low < truth) & (truth < before.high)).all()


def test_what_was_never_measured_is_flagged() -> None:
    cases, cards = grid(), {name: load_hardware(name) for name in ("a100", "h100")}
    belief = calibrate(cases, step_time(cases).seconds, np.full(len(cases), "one"))
    row = MODEL | {"micro_batch": 1, "dp": 8}
    others = Cases.of(
        [
            row,
            row | {"precision": "fp16"},
            row | {"hardware": "h100"},
            row | {"hardware": "h100", "precision": "fp8"},
            row | {"experts": 8, "top_k": 2, "expert_ffn": 1024},
        ],
        cards,
    )
    assert predict(belief, others).unseen.tolist() == [False, False, True, True, True]


def test_times_that_are_none_are_refused() -> None:
    cases = grid()
    with pytest.raises(UserError, match="must be positive numbers; leave other rows out"):
        calibrate(cases, np.zeros(len(cases)), np.full(len(cases), "one"))
