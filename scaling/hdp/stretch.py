"""Extra cost of documents of mixed lengths over uniform sequences, from the plan's makespan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.scaling.hdp.check import PlanError, check_plan
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan


def makespan(plan: Plan) -> float:
    """Return the seconds until the last rank has run its units; ring members start together.

    Without a pipeline the result equals ``parallel.hdp.replay``'s makespan. Raises PlanError if the
    plan deadlocks.
    """
    check_plan(plan)
    at, free = [0] * plan.ranks, [0.0] * plan.ranks

    def next_unit(rank: int) -> int | None:
        """Return the next unit of a rank (None: a dummy); -1 if all units have run."""
        return plan.orders[rank][at[rank]] if at[rank] < len(plan.orders[rank]) else -1

    awake = list(range(plan.ranks))
    while awake:
        rank = awake.pop()
        number = next_unit(rank)
        if number == -1:
            continue
        ring = (rank,) if number is None else plan.units[number].ring
        if any(next_unit(other) != number for other in ring):
            continue  # the last member to arrive continues
        end = max(free[r] for r in ring) + (0.0 if number is None else plan.units[number].cost)
        for r in ring:
            at[r], free[r] = at[r] + 1, end
        awake.extend(ring)
    if any(next_unit(rank) != -1 for rank in range(plan.ranks)):
        raise PlanError("ranks wait for each other's rings in different orders")
    return max(free)


def document_columns(plan: Plan, cost: CostModel) -> dict[str, float]:
    """Return the columns of ``planner.cases.Cases`` for the cost of a plan's documents.

    ``attended``: mean number of tokens that the attention of a token reads; ``document_stretch``:
    makespan divided by the seconds of computation if ranks share it evenly, which includes ring
    messages, idle ranks and the fixed cost of micro-batches.
    """
    lengths = np.asarray(plan.lengths, dtype=np.float64)
    tokens, pairs = lengths.sum(), (lengths * (lengths + 1)).sum()
    even = float(cost.compute(tokens, pairs)) / plan.ranks
    attended = float((lengths**2).sum() / tokens)
    return {"attended": attended, "document_stretch": makespan(plan) / even}


def mean_columns(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of several steps' ``document_columns``."""
    return {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}
