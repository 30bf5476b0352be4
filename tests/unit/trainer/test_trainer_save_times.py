"""Saves by the clock, and their best interval."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from allometry.configs.checkpoints import CheckpointConfig
from allometry.trainer.save_times import SaveTimes
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.interval import LLAMA3_DEVICE_HOURS, Uptime, best_interval_s


def lost_share(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Return the share of time lost if failures are a Poisson process (Daly 2006, equation 20).

    Without restarts: exp((T + C) / M) - 1 times M is spent on T seconds of work.
    """
    return mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s) / interval_s - 1.0


@pytest.mark.parametrize(("cost_s", "mtbf_s"), [(1.0, 1e4), (30.0, 1e4), (200.0, 2e3)])
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float) -> None:
    """To within a thousandth of the lost time, the error of Daly's expansion."""
    best = best_interval_s(cost_s, mtbf_s)
    others = best * np.geomspace(0.05, 20.0, 4001)
    least = min(lost_share(float(other), cost_s, mtbf_s) for other in others)
    assert lost_share(best, cost_s, mtbf_s) <= least * 1.001
    assert best == pytest.approx(math.sqrt(2 * cost_s * mtbf_s), rel=0.3)  # Young


def test_a_save_that_costs_more_than_failures_leave() -> None:
    assert best_interval_s(2e4, 1e4) == 1e4


def test_failures_are_those_launches_that_another_one_followed(tmp_path: Path) -> None:
    told = [
        *((0, "started"), (100, "checkpoint_saved"), (130, "resumed"), (200, "stopped")),
        *((900, "resumed"), (950, "checkpoint_saved"), (1000, "resumed"), (1001, "config_changed")),
    ]
    folder = RunFolder(tmp_path)
    folder.events.write_text(
        "".join(json.dumps({"event": kind, "time": time}) + "\n" for time, kind in told)
    )
    uptime = Uptime.of(folder)
    assert uptime == Uptime(100 + 70 + 50, 2)
    before = LLAMA3_DEVICE_HOURS * 3600 / 1000
    assert uptime.mtbf_s(1000) == pytest.approx((before + 220) / 3)
    assert 50_000 < LLAMA3_DEVICE_HOURS < 51_000


class Ranks:
    """``count`` ranks that receive each other's values one step later; the
    first is the main rank."""

    def __init__(self, count: int, **config: Any) -> None:
        self.now_s, self.busy = [0.0] * count, [False] * count
        section = CheckpointConfig.model_validate(config)
        self.times = [
            SaveTimes(
                section,
                SimpleNamespace(is_main=not rank, world_size=count),  # type: ignore[arg-type]
                lambda rank=rank: self.busy[rank],  # type: ignore[misc]
                Uptime(),
                lambda rank=rank: self.now_s[rank],  # type: ignore[misc]
            )
            for rank in range(count)
        ]
        self.told: list[Any] | None = None

    def step(self, number: int) -> set[tuple[bool, bool]]:
        """Return the ranks' decisions after this step."""
        if len(self.times) == 1 or self.told is None:
            self.told = [each.told() for each in self.times]
        heard = [max(numbers) for numbers in zip(*self.told, strict=True)]
        for each in self.times:
            each.heard(heard)
        self.told = [each.told() for each in self.times]
        return {(each.checkpoint_due(number), each.copy_due(number)) for each in self.times}

    def begun(self, number: int, **how: Any) -> None:
        for each in self.times:
            each.begun(number, **how)


@pytest.mark.parametrize("count", [1, 3])
def test_all_ranks_save_at_the_step_that_the_main_ranks_clock_says(count: int) -> None:
    ranks = Ranks(count, every_minutes=1.0, local={"every_minutes": 0.25})
    made: list[tuple[int, str]] = []
    for step in range(1, 200):
        ranks.now_s = [step + 7.0 * rank for rank in range(count)]  # clocks differ
        (decided,) = ranks.step(step)
        if any(decided):
            copy = not decided[0]
            made.append((step, "copy" if copy else "checkpoint"))
            ranks.begun(step, copy=copy, cost_s=0.1)
    whole = [step for step, kind in made if kind == "checkpoint"]
    assert len(whole) == 3
    assert all(59 <= after - before <= 62 for before, after in pairwise(whole))
    copies = [step for step, kind in made if kind == "copy"]
    assert 9 <= len(copies) <= 12
    assert copies[0] in (15, 16)


def test_a_copy_waits_for_what_is_being_written_on_any_rank() -> None:
    ranks = Ranks(2, local={"every_steps": 4})
    ranks.busy = [False, True]
    assert [ranks.step(step) for step in range(1, 7)] == [{(False, False)}] * 6
    ranks.busy = [False, False]
    assert ranks.step(7) == {(False, False)}  # received one step later
    assert ranks.step(8) == {(False, True)}
    ranks.begun(8, copy=True, cost_s=0.1)
    assert ranks.step(9) == {(False, False)}


def test_auto_follows_what_saves_cost() -> None:
    ranks = Ranks(1, every_minutes="auto")
    (times,) = ranks.times
    ranks.now_s = [59.0]
    assert ranks.step(1) == {(False, False)}
    ranks.now_s = [60.0]
    assert ranks.step(2) == {(True, False)}
    times.begun(2, copy=False, cost_s=2.0)
    interval_s = best_interval_s(2.0, LLAMA3_DEVICE_HOURS * 3600)
    ranks.now_s = [60.0 + interval_s - 1]
    assert ranks.step(3) == {(False, False)}
    ranks.now_s = [60.0 + interval_s + 1]
    assert ranks.step(4) == {(True, False)}
