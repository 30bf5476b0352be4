"""Calibration of the planner finds the constants of simulated times, and ignores faulty runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from allometry.configs.errors import UserError
from allometry.configs.machine import load_hardware
from allometry.scaling.planner.calibrate import Calibration, adapt, choose_runs, predict
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.cost import step_time
from allometry.scaling.planner.faults import SLOW, slowness
from allometry.scaling.planner.fit import calibrate

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
    one = found.of_source("one")
    own = np.abs(np.log(predict(one, cases).seconds / clean))
    assert before > 0.2
    assert own.max() < 0.06
    assert one.constants("ampere").launch_eager_s == pytest.approx(3e-3, rel=0.15)
    # Constants without data keep their values.
    common = found.constants("ampere")
    assert common.experts_bandwidth == pytest.approx(Constants().experts_bandwidth)


def test_a_generation_of_cards_has_its_own_rates() -> None:
    """A rate that one generation reaches in two frameworks applies to that generation only."""
    row = MODEL | {"micro_batch": 16, "dp": 8}
    cards = {name: load_hardware(name) for name in ("a100", "h100")}
    rows = [
        row | {"hardware": card, "width": width, "ffn": 4 * width}
        for card in ("a100", "h100")
        for width in (2048, 4096, 8192)
    ]
    cases = Cases.of(rows * 2, cards)
    rate = np.where(cases.hardware == "h100", 0.8, 1.0)
    products = replace(Constants(), products=rate)
    sources = np.repeat(["one", "two"], len(rows))
    found = calibrate(cases, step_time(cases, products).seconds, sources)
    ampere, hopper, other = (found.constants(name) for name in ("ampere", "hopper", "other"))
    assert hopper.products / ampere.products == pytest.approx(0.8, abs=0.05)
    assert hopper.products < other.products < ampere.products
    assert np.abs(found.own["one"]).max() < 0.05


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


def test_runs_far_from_the_belief_are_learned_from_where_the_belief_allows_it() -> None:
    """A power-limited card: every run takes longer than predicted by the same factor."""
    cases, belief = grid(), Calibration.before()
    slow = replace(Constants(), products=0.6, attention=0.5, memory=0.6, launch_eager_s=4e-3)
    truth = step_time(cases, slow).seconds
    some = np.arange(0, len(cases), 4)
    before, after = (
        np.median(np.abs(truth / predict(b, cases).seconds - 1))
        for b in (belief, adapt(belief, cases.take(some), truth[some]))
    )
    assert before > 0.5
    assert after < 0.05
    # A run that the prior considers impossible hardly changes it.
    wrong = truth[some] * np.where(some == 8, 50, 1)
    stalled = adapt(belief, cases.take(some), wrong)
    assert np.median(np.abs(truth / predict(stalled, cases).seconds - 1)) < before / 3


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


def test_runs_that_a_fault_made_slow_are_found_without_a_model() -> None:
    cases = grid()
    seconds, sources = step_time(cases, TRUTH).seconds, np.full(len(cases), "one")
    clean = slowness(cases, seconds, sources)
    assert clean.max() < SLOW
    stalled = seconds.copy()
    stalled[[3, 10]] *= 4
    found = slowness(cases, stalled, sources)
    assert set(np.flatnonzero(found > SLOW)) == {3, 10}
    # Fast runs of another source prove no fault in this one.
    apart = np.where(np.isin(np.arange(len(cases)), [3, 10]), "two", "one")
    assert slowness(cases, stalled, apart).max() < SLOW
