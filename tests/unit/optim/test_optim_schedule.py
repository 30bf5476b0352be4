from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from allometry.configs.data import BatchConfig
from allometry.configs.errors import UserError
from allometry.configs.optimization import ScheduleConfig
from allometry.configs.run import RunConfig
from allometry.optim.schedule import Schedule, resolve_schedule
from allometry.scaling.batch import BatchPlan

DECAYS: list[dict[str, Any]] = [
    {"kind": "linear", "final_fraction": 0.2},
    {"kind": "cosine", "final_fraction": 0.2},
    {"kind": "wsd", "decay": "exponential", "final_fraction": 0.2, "decay_fraction": 0.25},
    {"kind": "wsd", "decay": "linear", "final_fraction": 0.2, "decay_fraction": 0.25},
    {"kind": "wsd", "decay": "1-sqrt", "final_fraction": 0.2, "decay_fraction": 0.25},
]


def schedule(config: dict[str, Any], total: int, warmup: int) -> Schedule:
    parsed: Any = TypeAdapter(ScheduleConfig).validate_python(config)
    return Schedule(parsed, total, warmup)


def curve(config: dict[str, Any], total: int, warmup: int) -> list[float]:
    made = schedule(config, total, warmup)
    return [made.fraction(step) for step in range(1, total + 1)]


def test_warmup_is_a_line_whose_last_step_is_at_the_peak() -> None:
    for config in ({"kind": "constant"}, *DECAYS):
        assert curve(config, 40, 4)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant_stays() -> None:
    assert curve({"kind": "constant"}, 9, 3)[2:] == [1.0] * 7
    assert curve({"kind": "constant"}, 3, 0) == [1.0] * 3
    assert curve({"kind": "constant"}, 3, 3)[-1] == 1.0


def test_wsd_boundaries() -> None:
    for config in DECAYS[2:]:
        rates = curve(config, 100, 10)
        assert rates[8] == 0.9
        assert rates[9:75] == [1.0] * 66  # steps 10 ... 75
        assert rates[75] < 1.0  # step 76, the first of the 25 of the decay
        assert rates[99] == 0.2


def test_forms_by_hand() -> None:
    quarter = {"linear": 0.8, "exponential": 0.2**0.25, "1-sqrt": 0.6}
    for decay, expected in quarter.items():
        config = {"kind": "wsd", "decay": decay, "final_fraction": 0.2, "decay_fraction": 0.2}
        assert schedule(config, 100, 0).fraction(85) == pytest.approx(expected, rel=1e-12)
    assert schedule(DECAYS[0], 110, 10).fraction(60) == pytest.approx(0.6, rel=1e-12)
    third = 0.2 + 0.8 * 0.5 * (1.0 + math.cos(math.pi * 0.25))
    assert schedule(DECAYS[1], 110, 10).fraction(35) == pytest.approx(third, rel=1e-12)


@pytest.mark.parametrize("config", DECAYS, ids=lambda c: f"{c['kind']}-{c.get('decay', '')}")
def test_decay_falls_without_a_jump_and_ends_where_it_should(config: dict[str, Any]) -> None:
    for total, warmup in ((100, 10), (7, 2), (10_000, 0)):
        rates = curve(config, total, warmup)
        start = schedule(config, total, warmup).decay_start
        falling = rates[max(0, start - 1) :]
        assert all(before > after for before, after in pairwise(falling))
        assert rates[-1] == 0.2
    # With more steps the first value of the decay approaches the peak: no jump at its start.
    first = schedule(config, 10_000_000, 0)
    assert first.fraction(first.decay_start + 1) == pytest.approx(1.0, abs=1e-3)


def test_to_zero_and_the_shortest_runs() -> None:
    assert curve({"kind": "wsd", "decay_fraction": 1e-9}, 5, 1) == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert curve({"kind": "linear"}, 1, 0) == [0.0]
    assert curve({"kind": "wsd", "decay": "linear", "decay_fraction": 1.0}, 4, 0) == [
        0.75,
        0.5,
        0.25,
        0.0,
    ]


def test_warmup_that_leaves_no_room() -> None:
    with pytest.raises(UserError, match="warm-up of 11 steps is longer than the run, 10 steps"):
        schedule({"kind": "constant"}, 10, 11)
    with pytest.raises(UserError, match="decay of kind=cosine begins after step 10 of 10"):
        schedule({"kind": "cosine"}, 10, 10)
    with pytest.raises(UserError, match="begins after step 80 of 100, but the warm-up takes 81"):
        schedule({"kind": "wsd", "decay_fraction": 0.2}, 100, 81)
    schedule({"kind": "wsd", "decay_fraction": 0.2}, 100, 80)


def test_resolve_turns_tokens_into_steps() -> None:
    config = RunConfig.model_validate(
        {
            "run": {"folder": "somewhere"},
            "model": {
                "kind": "dense",
                "vocab_size": 8,
                "width": 8,
                "num_layers": 1,
                "num_heads": 2,
                "ffn_width": 8,
            },
            "data": {"sequence_length": 10, "sources": [{"name": "a", "train": "a"}]},
            "batch": {"sequences": 4, "micro_batch_sequences": 1},
            "training": {"total_tokens": 990},
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "cosine", "warmup_tokens": 81},
        }
    )
    plan = BatchPlan(BatchConfig(sequences=4, micro_batch_sequences=1), 10)
    resolved = resolve_schedule(config, plan)
    assert (resolved.total_steps, resolved.warmup_steps) == (25, 3)


def batch_plan() -> BatchPlan:
    return BatchPlan(BatchConfig(sequences=4, micro_batch_sequences=1), 10)


def long_curve(config: dict[str, Any], total: int, warmup: int) -> list[float]:
    parsed: Any = TypeAdapter(ScheduleConfig).validate_python(config)
    made = Schedule(parsed, total, warmup, batch_plan())
    return [made.fraction(step) for step in range(1, total + 1)]


WSD_S: dict[str, Any] = {"kind": "wsd_s", "decay_fraction": 0.25, "final_fraction": 0.2}


def test_each_end_of_several_decays_is_a_run_of_wsd_up_to_there() -> None:
    for decay in ("exponential", "linear", "1-sqrt"):
        shape = {"decay": decay, "decay_fraction": 0.25, "final_fraction": 0.2}
        several = long_curve({**WSD_S, **shape, "decay_ends_steps": [40, 100]}, 200, 4)
        assert several[:40] == long_curve({"kind": "wsd", **shape}, 40, 4)
        assert several[39] == several[99] == several[199] == 0.2
        assert several[40] == several[100] == 1.0, "back at the peak at once"
        for end in (100, 200):  # the decay of a run of that length
            length = end // 4
            assert several[end - length - 1] == 1.0
            wanted = long_curve({"kind": "wsd", **shape}, end, 0)[end - length : end]
            assert several[end - length : end] == pytest.approx(wanted, rel=1e-12)


def test_warming_up_again_and_ends_in_tokens() -> None:
    config = {**WSD_S, "decay_ends_tokens": [1581], "rewarmup_steps": 4}
    rates = long_curve(config, 100, 0)
    assert rates == long_curve({**WSD_S, "decay_ends_steps": [40], "rewarmup_steps": 4}, 100, 0)
    assert rates[39:45] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0], rel=1e-12)
    assert all(a <= b for a, b in pairwise(rates[39:50]))


def test_several_decays_that_have_no_room() -> None:
    with pytest.raises(UserError, match="step 200 is not before the end of the run, 200 steps"):
        long_curve({**WSD_S, "decay_ends_steps": [200]}, 200, 0)
    for later in (200, 300):  # not only the first end
        with pytest.raises(UserError, match=f"step {later} is not before the end of the run, 200"):
            long_curve({**WSD_S, "decay_ends_steps": [50, later]}, 200, 0)
    with pytest.raises(UserError, match="but the warm-up takes 6"):
        long_curve({**WSD_S, "decay_ends_steps": [70], "rewarmup_steps": 6}, 100, 0)
    for wrong in (
        {},
        {"decay_ends_steps": [5, 5]},
        {"decay_ends_steps": [5], "decay_ends_tokens": [1]},
    ):
        with pytest.raises(ValueError, match="decay"):
            TypeAdapter(ScheduleConfig).validate_python({**WSD_S, **wrong})


def test_a_run_taken_further() -> None:
    before = {"kind": "cosine", "warmup_steps": 5, "final_fraction": 0.1}
    after = {"kind": "linear", "warmup_steps": 10}
    config = {"kind": "continued", "before": before, "before_steps": 50, "after": after}
    rates = long_curve(config, 150, 5)
    assert rates[:50] == long_curve(before, 50, 5), "what was trained stays as it was"
    assert rates[50] == pytest.approx(0.1 + 0.9 * 0.1, rel=1e-12)
    assert rates[59] == 1.0
    assert rates[60:] == long_curve({"kind": "linear"}, 100, 10)[10:]
    by_tokens = {**config, "after": {"kind": "linear", "warmup_tokens": 400}}
    assert long_curve(by_tokens, 150, 5) == rates
    with pytest.raises(UserError, match=r"before_steps: step 50 is not before the end"):
        long_curve(config, 50, 5)


def refined(folder: Path, fractions: list[float]) -> dict[str, Any]:
    file = folder / "schedule.json"
    file.write_text(json.dumps({"kind": "allometry.schedule", "fractions": fractions}))
    return {"kind": "refined", "file": str(file)}


def test_refined_rates_are_those_of_the_file(tmp_path: Path) -> None:
    config = refined(tmp_path, [0.5, 1.0, 0.4, 0.0])
    assert curve(config, 4, 0) == [0.5, 1.0, 0.4, 0.0]
    assert curve(config, 7, 0) == pytest.approx([0.5, 0.75, 1.0, 0.7, 0.4, 0.2, 0.0], rel=1e-12)
    assert curve(config, 2, 0) == [0.5, 0.0]
    assert curve(config, 1, 0) == [0.5]
    assert curve(config, 4, 2) == [0.25, 1.0, 0.4, 0.0]


def test_files_that_are_no_schedule(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        curve({"kind": "refined", "file": str(tmp_path / "none.json")}, 4, 0)
    for content in ("{", "[]", '{"kind": "x"}', '{"kind": "allometry.schedule"}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match="is not a refined schedule"):
            curve({"kind": "refined", "file": str(tmp_path / "bad.json")}, 4, 0)
    with pytest.raises(UserError, match="between 0 and 1"):
        curve(refined(tmp_path, [0.5, 1.5]), 4, 0)
