"""Rules that every plan satisfies, independent of its policy."""

from __future__ import annotations

import numpy as np

from allometry.scaling.hdp.plan import Plan, member_tokens


class PlanError(ValueError):
    """Raised if a plan violates a rule or deadlocks. This is a bug: no config may cause it."""


def check_plan(plan: Plan) -> None:
    """Check that every document is run once, by consistent ranks, within the capacity.

    Raises:
        PlanError: the first violated rule, with unit, ranks and place.
    """
    _check_documents(plan)
    places = _places(plan)
    counts = {len(order) for order in plan.orders}
    if len(plan.orders) != plan.ranks:
        raise PlanError(f"{plan.ranks} hdp ranks have {len(plan.orders)} orders")
    if plan.mode != "free" and min(counts) == 0:
        raise PlanError(f"an hdp rank has no micro-batch, which mode {plan.mode} cannot have")
    if plan.mode == "lockstep" and len(counts) != 1:
        raise PlanError(f"mode lockstep has orders of different lengths: {sorted(counts)}")
    for number, unit in enumerate(plan.units):
        placed = places[number]
        ring = list(unit.ring)
        if sorted(rank for rank, _ in placed) != sorted(ring) or len(set(ring)) != len(ring):
            raise PlanError(
                f"unit {number} has the ring {ring}, but stands in the orders of hdp ranks "
                f"{sorted(rank for rank, _ in placed)}"
            )
        if plan.mode != "free" and len({place for _, place in placed}) != 1:
            raise PlanError(
                f"unit {number} stands at different places of its ring {ring}: "
                + ", ".join(f"micro-batch {place} of rank {rank}" for rank, place in placed)
            )
    _check_capacity(plan)


def _check_documents(plan: Plan) -> None:
    documents = np.fromiter(
        (document for unit in plan.units for document in unit.documents), dtype=np.int64
    )
    if documents.size and not 0 <= documents.min() <= documents.max() < len(plan.lengths):
        raise PlanError(f"there is no document {documents.max()} of {len(plan.lengths)}")
    times = np.bincount(documents, minlength=len(plan.lengths))
    wrong = np.flatnonzero(times != 1)
    if wrong.size:
        raise PlanError(f"document {wrong[0]} is in {times[wrong[0]]} units instead of one")


def _places(plan: Plan) -> list[list[tuple[int, int]]]:
    """Return the (rank, place) pairs of each unit."""
    placed: list[list[tuple[int, int]]] = [[] for _ in plan.units]
    for rank, order in enumerate(plan.orders):
        for place, number in enumerate(order):
            if number is None:
                continue
            if not 0 <= number < len(placed):
                raise PlanError(f"hdp rank {rank} has no unit {number} of {len(placed)} to run")
            placed[number].append((rank, place))
    return placed


def _check_capacity(plan: Plan) -> None:
    """Check the padded tokens of members; with k of l layers offloaded, (l - k) c <= l C."""
    if plan.capacity is None:
        return
    for number, unit in enumerate(plan.units):
        degree = len(unit.ring)
        lengths = [plan.lengths[document] for document in unit.documents]
        most = sum(-(-length // degree) for length in lengths)  # exact for one document
        if _fits(plan, most, unit.offload):
            continue
        most = max(member_tokens(lengths, degree, member) for member in range(degree))
        if not _fits(plan, most, unit.offload):
            raise PlanError(
                f"unit {number} gives a rank of {list(unit.ring)} {most} tokens, more than "
                f"{plan.capacity} with {unit.offload:.0%} of its layers offloaded"
            )


def _fits(plan: Plan, tokens: int, offload: float) -> bool:
    assert plan.capacity is not None
    filled = -(-tokens // plan.multiple) * plan.multiple
    away = round(offload * (plan.layers - 2)) if offload else 0
    return filled * (plan.layers - away) <= plan.capacity * plan.layers
