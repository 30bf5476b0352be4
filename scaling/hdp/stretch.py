"""What documents of mixed lengths cost more than whole sequences would: the plan's own makespan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.scaling.hdp.check import PlanError, check_plan
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan


def makespan(plan: Plan) -> float:
    """Seconds until the last rank has run its units; a ring's members start together.

    Without a pipeline it is ``parallel.hdp.replay``'s. Raises PlanError for a plan that never
    ends.
    """
    check_plan(plan)
    at, free = [0] * plan.ranks, [0.0] * plan.ranks

    def next_unit(rank: int) -> int | None:
        """The unit that a rank would run now, if it has one left; -1: none."""
        return plan.orders[rank][at[rank]] if at[rank] < len(plan.orders[rank]) else -1

    awake = list(range(plan.ranks))
    while awake:
        rank = awake.pop()
        number = next_unit(rank)
        if number == -1:
            continue
        ring = (rank,) if number is None else plan.units[number].ring
        if any(next_unit(other) != number for other in ring):
            continue  # the last of them to arrive takes the others along
        end = max(free[r] for r in ring) + (0.0 if number is None else plan.units[number].cost)
        for r in ring:
            at[r], free[r] = at[r] + 1, end
        awake.extend(ring)
    if any(next_unit(rank) != -1 for rank in range(plan.ranks)):
        raise PlanError("ranks wait for each other's rings in different orders")
    return max(free)


def document_columns(plan: Plan, cost: CostModel) -> dict[str, float]:
    """Return the columns of ``planner.cases.Cases`` that say what a plan's documents cost.

    ``attended``: tokens that a token's attention reads, on average; ``document_stretch``: the
    makespan over the seconds that the arithmetic alone takes when ranks share it evenly, so that
    rings' messages, idle ranks and the cost of each micro-batch are in it.
    """
    lengths = np.asarray(plan.lengths, dtype=np.float64)
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1)).sum()
    even = float(cost.compute(tokens, pairs)) / plan.ranks
    attended = float((lengths**2).sum() / tokens)
    return {"attended": attended, "document_stretch": makespan(plan) / even}


def mean_columns(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means over steps' ``document_columns``."""
    return {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
