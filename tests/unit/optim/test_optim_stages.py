"""Rates of runs in stages: each schedule counts from the first step of its stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.optim.schedule import Schedule, schedules_of
from allometry.scaling.batch import BatchPlan
from allometry.scaling.stages import place_at, places_of
from allometry.trainer.record.rates import one_curve, planned_rates

Make = Callable[..., RunConfig]
STEPS = 12
KINDS: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant"},
    "linear": {"kind": "linear"},
    "cosine": {"kind": "cosine"},
    "wsd": {"kind": "wsd", "decay_fraction": 0.5},
    "whole decay": {"kind": "wsd", "decay_fraction": 1.0, "decay": "linear"},
    "wsd_s": {"kind": "wsd_s", "decay_ends_steps": [4], "rewarmup_steps": 1},
    "wsd_s in tokens": {"kind": "wsd_s", "decay_ends_tokens": [4 * 512]},
    "refined": {"kind": "refined"},
    "continued": {
        "kind": "continued",
        "before": {"kind": "cosine"},
        "before_steps": 5,
        "after": {"kind": "linear"},
    },
}
UNWARMED = ("continued", "whole decay")  # its parts warm up; too short for a warm-up


def run(tiny: Make, *stages: dict[str, Any]) -> RunConfig:
    named = [{"name": f"s{number}"} | one for number, one in enumerate(stages)]
    return tiny("training.total_steps=null", f"stages={json.dumps(named)}")


def described(tmp_path: Path, kind: str) -> dict[str, Any]:
    schedule = dict(KINDS[kind])
    if kind == "refined":
        file = tmp_path / "refined.json"
        fractions = [0.9 - 0.05 * k for k in range(STEPS)]
        file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": fractions}))
        schedule["file"] = str(file)
    return schedule


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_counts_from_the_first_step_of_its_stage(
    tiny: Make, tmp_path: Path, kind: str
) -> None:
    """Equals the rates of a run of the stage's length alone, at the stage's own peak."""
    schedule = described(tmp_path, kind)
    second = {"steps": STEPS, "schedule": schedule, "optimizer": {"lr": 3e-3}}
    second |= {"batch": {"sequences": 16}}
    config = run(tiny, {"steps": 7, "schedule": {"kind": "linear"}}, second)
    alone = run(tiny, second)
    rates = planned_rates(config).rates
    own = planned_rates(alone).rates
    assert rates[7:].tolist() == own.tolist()
    parsed = config.of_stages()[1].schedule
    plan = BatchPlan(config.of_stages()[1].batch, 32)
    by_hand = Schedule(parsed, STEPS, 0, plan)
    assert rates[7] == 3e-3 * by_hand.fraction(1)
    first = {"refined": 0.9, "linear": 1 - 1 / 12, "whole decay": 1 - 1 / 12}.get(kind)
    first = first or {"cosine": None, "continued": None, "wsd_s in tokens": 1.0}.get(kind, 1.0)
    if first is not None:
        assert rates[7] == pytest.approx(3e-3 * first)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in UNWARMED])
def test_a_warm_up_climbs_from_the_last_rate(tiny: Make, tmp_path: Path, kind: str) -> None:
    schedule = described(tmp_path, kind) | {"warmup_steps": 2}
    linear = {"kind": "linear", "final_fraction": 0.25}
    second = {"steps": STEPS, "schedule": schedule, "optimizer": {"lr": 5e-3}}
    rates = planned_rates(run(tiny, {"steps": 7, "schedule": linear}, second)).rates
    last = 0.25 * 1e-2
    assert rates[6] == last
    peak = 5e-3 * (0.85 if kind == "refined" else 1.0)  # a warm-up multiplies refined rates
    if kind != "refined":
        assert rates[7] == pytest.approx(last + (peak - last) / 2)
    else:
        assert rates[7] == pytest.approx(0.5 * last + 0.5 * 5e-3 * 0.9)
    assert rates[8] == pytest.approx(peak)


def test_lengths_in_tokens_are_rounded_up_to_whole_steps(tiny: Make) -> None:
    config = run(
        tiny,
        {"tokens": 1000},
        {"tokens": 1000, "data": {"sequence_length": 64}, "batch": {"sequences": 4}},
        {"steps": 2, "batch": {"sequences": 4}},
    )
    places = places_of(config)
    assert [place.steps for place in places] == [4, 4, 2]
    assert [place.last_step for place in places] == [4, 8, 10]
    batch = places[-1].batch
    assert [batch.tokens_after(step) for step in (0, 4, 5, 8, 9, 10)] == [
        *(0, 1024, 1280, 2048, 2176, 2304)
    ]
    assert [batch.steps_for_tokens(tokens) for tokens in (0, 1024, 1025, 2049, 2304)] == [
        *(0, 4, 5, 9, 10)
    ]
    assert [batch.sequences_before(step) for step in (1, 5, 9, 11)] == [0, 32, 48, 56]
    assert place_at(places, 3).number == 1
    assert place_at(places, 4).number == 2
    assert place_at(places, 10).number == 3


def test_a_stage_shorter_than_its_warm_up(tiny: Make) -> None:
    short = {"steps": 4, "schedule": {"kind": "wsd", "warmup_steps": 5}}
    with pytest.raises(UserError, match=r"stage s1: its warm-up of 5 steps is longer than the sta"):
        schedules_of(run(tiny, {"steps": 9, "schedule": {"kind": "constant"}}, short))
    with pytest.raises(UserError, match="a warm-up of 30 steps is longer than the run, 20 steps"):
        schedules_of(tiny("schedule.warmup_steps=30"))


def test_a_curve_ends_where_more_than_rates_change(tiny: Make) -> None:
    constant, linear = {"kind": "constant"}, {"kind": "linear"}
    other = {"mixture": {"up": 1}}
    config = run(
        tiny,
        {"steps": 5, "schedule": constant},
        {"steps": 4, "schedule": linear, "optimizer": {"lr": 1e-3}},
        {"steps": 3, "schedule": constant} | other,
        {"steps": 2, "schedule": linear} | other,
    )
    for taken, expected in ((0, (1, 9)), (6, (1, 9)), (9, (10, 14)), (13, (10, 14))):
        first, last, rates = one_curve(config, taken)
        assert (first, last) == expected
        assert len(rates.rates) == last
    assert planned_rates(config).rates[5] == pytest.approx(0.75e-3)
