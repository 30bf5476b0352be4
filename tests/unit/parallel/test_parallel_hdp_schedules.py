"""Pipelines of different lengths reach their common rings in compatible orders."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import combinations_with_replacement

import pytest

from allometry.configs.execution import SCHEDULES
from allometry.parallel.hdp.orders import schedule_orders
from allometry.parallel.hdp.replay import replay
from allometry.scaling.hdp.check import PlanError
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import INTERLEAVED_ROUNDS, ONE_STAGE_SCHEDULES, least_micro_batches


def all_in_rings(first: int, second: int) -> Plan:
    """Return two pipelines whose common micro-batches are all rings; the rest are dummies."""
    common = min(first, second)
    units = tuple(Unit((number,), (0, 1), 1.0) for number in range(common))
    orders = tuple((*range(common), *[None] * (count - common)) for count in (first, second))
    return Plan((8,) * common, 2, "aligned", units, orders)


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rings_with_equal_numbers_never_wait_in_a_circle(schedule: str, pp: int) -> None:
    stages = 1 if schedule in ONE_STAGE_SCHEDULES else 2
    orders = lru_cache(partial(schedule_orders, schedule, pp, stages))
    step = pp if schedule in INTERLEAVED_ROUNDS else 1
    start = max(step, least_micro_batches(schedule, pp))
    counts = range(start, start + 6 * step, step)
    for first, second in combinations_with_replacement(counts, 2):
        assert replay(all_in_rings(first, second), orders).makespan > 0


@pytest.mark.parametrize("schedule", INTERLEAVED_ROUNDS)
def test_rounds_of_different_sizes_do_wait_in_a_circle(schedule: str) -> None:
    """Six micro-batches on four ranks are one round of six, eight are two of four."""
    orders = lru_cache(partial(schedule_orders, schedule, 4, 2))
    with pytest.raises(PlanError, match="never ends"):
        replay(all_in_rings(6, 8), orders)
