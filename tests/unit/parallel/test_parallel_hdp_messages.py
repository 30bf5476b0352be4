"""Messages matched by order alone, as in NCCL, for plans and for messages out of order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allometry.configs.execution import SCHEDULES
from allometry.parallel.hdp.messages import Message, Post, Step, Wait, match, programs_of
from allometry.parallel.hdp.orders import Orders, schedule_orders
from allometry.parallel.hdp.replay import replay
from allometry.scaling.hdp.check import PlanError
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import ONE_STAGE_SCHEDULES


def aligned_plan(random: np.random.Generator, ranks: int, rounds: int, pp: int) -> Plan:
    """Return rounds of 2 pp micro-batches, with units of one to all ranks in each position."""
    units: list[Unit] = []
    orders: list[list[int]] = [[] for _ in range(ranks)]
    for _ in range(2 * pp * rounds):
        left = random.permutation(ranks).tolist()
        while left:
            ring = tuple(left.pop() for _ in range(int(random.integers(1, len(left) + 1))))
            for rank in ring:
                orders[rank].append(len(units))
            units.append(Unit((len(units),), ring, 1.0))
    return Plan(
        lengths=[12] * len(units),
        ranks=ranks,
        mode="aligned",
        units=tuple(units),
        orders=tuple(map(tuple, orders)),
        capacity=12,
    )


def orders_of(schedule: str, pp: int, count: int) -> Orders:
    return schedule_orders(schedule, pp, 1 if schedule in ONE_STAGE_SCHEDULES else 2, count)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4), pp=st.integers(2, 3))
def test_what_ranks_send_is_what_their_peers_receive(
    schedule: str, seed: int, ranks: int, pp: int
) -> None:
    plan = aligned_plan(np.random.default_rng(seed), ranks, 1, pp)
    orders = partial(orders_of, schedule, pp)
    replay(plan, orders)
    programs = programs_of(plan, orders, layers=2)
    sent = sum(m.way == "send" for m in messages(programs))
    assert match(programs) == sent
    # On first contact, ranks of a ring wait for one another when they post.
    assert match(programs, blocking=("hdp",)) == sent


@given(seed=st.integers(0, 2**32), ranks=st.integers(2, 5))
@settings(max_examples=50, deadline=None)
def test_rings_without_a_pipeline(seed: int, ranks: int) -> None:
    plan = replace(aligned_plan(np.random.default_rng(seed), ranks, 1, 2), mode="free")
    one = partial(schedule_orders, "gpipe", 1, 1)
    hops = sum(len(u.ring) * (len(u.ring) - 1) * 3 for u in plan.units)
    assert match(programs_of(plan, one)) == match(programs_of(plan, one), ("hdp",)) == hops


def messages(programs: Mapping[tuple[int, int], list[Step]]) -> list[Message]:
    return [
        m for steps in programs.values() for s in steps if isinstance(s, Post) for m in s.messages
    ]


def test_two_kinds_in_another_order_on_one_communicator_are_caught() -> None:
    # Keys and gradients of a backward are in flight at the same time between two ranks.
    plan = replace(aligned_plan(np.random.default_rng(3), 4, 1, 1), mode="free")
    programs = programs_of(plan, partial(schedule_orders, "gpipe", 1, 1))
    assert match(programs) > 0
    caught = 0
    for rank, steps in programs.items():
        for i, (first, second) in enumerate(pairwise(steps)):
            if isinstance(first, Post) and isinstance(second, Post):
                swapped = [*steps[:i], second, first, *steps[i + 2 :]]
                with pytest.raises(PlanError, match="takes"):
                    match(programs | {rank: swapped})
                caught += 1
    assert caught > 0, "keys and gradients are posted one after the other somewhere"


def test_rings_in_another_order_are_caught() -> None:
    units = tuple(Unit((i,), (0, 1), 1.0) for i in range(2))
    plan = Plan(
        lengths=[12, 12], ranks=2, mode="free", units=units, orders=((0, 1), (1, 0)), capacity=12
    )
    # With equal sizes, one would be taken for the other: wrong gradients without a hang.
    with pytest.raises(PlanError, match=r"on communicator hdp rank .* takes .* for "):
        match(programs_of(plan, partial(schedule_orders, "gpipe", 1, 1)))


def uneven_plan(counts: tuple[int, ...], rings: range) -> Plan:
    """Return pipelines of different lengths; micro-batches ``rings`` span all of them."""
    units: list[Unit] = []
    orders: list[list[int]] = [[] for _ in counts]
    for place in range(max(counts)):
        members = tuple(rank for rank, count in enumerate(counts) if place < count)
        for ring in [members] if place in rings else [(rank,) for rank in members]:
            for rank in ring:
                orders[rank].append(len(units))
            units.append(Unit((len(units),), ring, 1.0))
    return Plan(
        lengths=[12] * len(units),
        ranks=len(counts),
        mode="aligned",
        units=tuple(units),
        orders=tuple(map(tuple, orders)),
        capacity=12,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_pipelines_of_different_lengths(schedule: str, pp: int) -> None:
    plan = uneven_plan((2 * pp, 6 * pp, 4 * pp), range(2 * pp))
    orders = partial(orders_of, schedule, pp)
    replay(plan, orders)
    programs = programs_of(plan, orders)
    assert match(programs) == match(programs, blocking=("hdp",)) > 0


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv_zero_bubble", "dualpipe_v"])
def test_rings_and_pipelines_need_communicators_of_their_own(schedule: str) -> None:
    plan = uneven_plan((8, 24, 16), range(8))
    orders = partial(orders_of, schedule, 4)
    shared = programs_of(plan, orders, communicators={"ring": "one", "pipeline": "one"})
    with pytest.raises(PlanError, match="messages never end"):
        match(shared)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv_zero_bubble", "dualpipe_v"])
def test_stages_must_not_meet_for_the_first_time_in_a_step(schedule: str) -> None:
    # A rank that blocks in a post, while NCCL connects, delays a ring.
    plan = uneven_plan((8, 24, 16), range(8))
    with pytest.raises(PlanError, match="messages never end"):
        match(programs_of(plan, partial(orders_of, schedule, 4)), blocking=("hdp", "pp"))


def exchange(*orders: str) -> dict[tuple[int, int], list[Step]]:
    """Return programs of two ranks; "s" sends, "r" receives, adjacent letters form a batch."""
    programs: dict[tuple[int, int], list[Step]] = {}
    for rank, order in enumerate(orders):
        steps: list[Step] = []
        for letters in order.split():
            post = Post(
                "c",
                tuple(
                    Message("send", (1 - rank, 0), f"of {rank}")
                    if letter == "s"
                    else Message("receive", (1 - rank, 0), f"of {1 - rank}")
                    for letter in letters
                ),
            )
            steps += [post, Wait(post)]
        programs[rank, 0] = steps
    return programs


@pytest.mark.parametrize(
    "orders", [("s r", "r s"), ("sr", "rs"), ("s r", "sr"), ("ss", "r r"), ("s rr", "r s s")]
)
def test_orders_that_end(orders: tuple[str, str]) -> None:
    assert match(exchange(*orders)) == sum(order.count("s") for order in orders)


@pytest.mark.parametrize("orders", [("s r", "s r"), ("r s", "r s"), ("s", ""), ("r", "")])
def test_orders_that_do_not(orders: tuple[str, str]) -> None:
    with pytest.raises(PlanError, match="messages never end"):
        match(exchange(*orders))
