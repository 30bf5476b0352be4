"""Record the assignment of documents to ranks: rows of plans.jsonl, and ``hdp/`` in metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from allometry.parallel.hdp.replay import Replay, summary
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan, Unit
from allometry.scaling.layout import Layout


def plan_rows(plan: Plan, cost: CostModel, played: Replay) -> dict[str, float | int]:
    """Return the columns ``hdp/`` of a step's row in metrics.jsonl from its plan."""
    of = summary(plan, cost, played)
    names = ("micro_batches", "waves", "dummies", "balance", "bytes_sent", "offloaded")
    degrees = {f"hdp/degree/{degree}": number for degree, number in of["degrees"].items()}
    return {f"hdp/{name}": of[name] for name in names} | degrees


def plan_record(plan: Plan, layout: Layout) -> dict[str, Any]:
    """Return the row of plans.jsonl for a plan, without its step (docs/file_formats.md).

    Of a unit's documents only their number, their tokens and the longest length are stored: enough
    to show each rank's work over time, in a size that does not grow with the documents.
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
    """Reconstruct a plan from a row of plans.jsonl.

    Each unit has the same number of documents and tokens and the same longest document; the lengths
    of the others are as equal as possible. The capacity limit of the true lengths may not apply to
    these lengths.
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
    """Return ``number`` lengths with sum ``tokens``: first the ``longest``, then nearly equal ones.

    For example, ``_spread(3, 10, 5)`` returns ``[5, 3, 2]``.
    """
    if number == 1:
        return [longest]
    each, more = divmod(tokens - longest, number - 1)
    return [longest, *[each + 1] * more, *[each] * (number - 1 - more)]
