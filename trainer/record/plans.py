"""How the documents of steps lay on ranks: the rows of plans.jsonl, and ``hdp/`` in metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allometry.parallel.hdp.replay import Replay, summary
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import Layout


def plan_rows(plan: Plan, cost: CostModel, played: Replay) -> dict[str, float | int]:
    """What the row of a step in metrics.jsonl says of its plan: the columns ``hdp/``."""
    of = summary(plan, cost, played)
    names = ("micro_batches", "waves", "dummies", "balance", "bytes_sent", "offloaded")
    degrees = {f"hdp/degree/{degree}": number for degree, number in of["degrees"].items()}
    return {f"hdp/{name}": of[name] for name in names} | degrees


def plan_record(plan: Plan, layout: Layout) -> dict[str, Any]:
    """The row of plans.jsonl for a plan, without its step (docs/file_formats.md).

    Of a unit's documents it keeps their number, their tokens and the longest one: enough to see
    who did what for how long, in a size that does not grow with the documents.
    """
    units: list[list[Any]] = []
    for unit in plan.units:
        lengths = [int(plan.lengths[number]) for number in unit.documents]
        documents = [len(lengths), sum(lengths), max(lengths)]
        units.append([*documents, list(unit.ring), float(f"{unit.cost:.6g}"), unit.offload])
    return {
        "mode": plan.mode,
        "ranks": plan.ranks,
        "capacity": plan.capacity,
        "pp": layout.degrees.pp,
        "schedule": layout.schedule if layout.degrees.pp > 1 else None,
        "stages": len(layout.stages),
        "units": units,
        "orders": [list(order) for order in plan.orders],
    }


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan that a row of plans.jsonl tells of.

    A unit has as many documents and tokens and the same longest one; its others are as even as can
    be. The capacity, which held for the true lengths, is not claimed for these.
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
