"""How the documents of steps lay on ranks, in the run's folder: plans.jsonl and a row's ``hdp/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allometry.parallel.hdp.plan import Plan, Unit
from allometry.scaling.layout import Layout


def plan_record(plan: Plan, capacity: int, layout: Layout) -> dict[str, Any]:
    """The row of plans.jsonl for a plan, without its step (docs/file_formats.md).

    Of a unit's documents it keeps their number, their tokens and the longest one: enough to see
    who did what for how long, in a size that does not grow with the documents.
    """
    return {
        "mode": plan.mode,
        "ranks": plan.ranks,
        "capacity": capacity,
        "pp": layout.degrees.pp,
        "schedule": layout.schedule if layout.degrees.pp > 1 else None,
        "stages": len(layout.stages),
        "units": [_unit_record(plan, unit) for unit in plan.units],
        "orders": [list(order) for order in plan.orders],
    }


def _unit_record(plan: Plan, unit: Unit) -> list[Any]:
    lengths = [int(plan.lengths[number]) for number in unit.documents]
    cost = float(f"{unit.cost:.6g}")
    return [len(lengths), sum(lengths), max(lengths), list(unit.ring), cost, unit.offload]


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan that a row of plans.jsonl tells of.

    Its units have as many documents, tokens and the same longest document; the others of a unit are
    as even as can be.
    """
    lengths: list[int] = []
    units = []
    for number, tokens, longest, ring, cost, offload in record["units"]:
        documents = range(len(lengths), len(lengths) + number)
        lengths += _spread(number, tokens, longest)
        units.append(Unit(tuple(documents), tuple(ring), cost, offload))
    orders = tuple(tuple(order) for order in record["orders"])
    return Plan(lengths, record["ranks"], record["mode"], tuple(units), orders)


def _spread(number: int, tokens: int, longest: int) -> Sequence[int]:
    """``number`` lengths that sum to ``tokens``, the first the ``longest``, the others even."""
    if number == 1:
        return [longest]
    each, more = divmod(tokens - longest, number - 1)
    return [longest, *[each + 1] * more, *[each] * (number - 1 - more)]
