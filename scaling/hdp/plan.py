"""Assignment of the documents of a global batch to ranks, and the order of each rank's units.

The module is pure and without torch: every rank computes the same plan from the same lengths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from allometry.configs.execution import ContextConfig
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.policies import POLICIES
from allometry.scaling.hdp.problem import Ints, Problem

Mode = Literal["free", "aligned", "lockstep"]
"""free: each rank runs any number of units in its own order. aligned: a ring has the same index in
the orders of all its members. lockstep: aligned, and all orders have the same length.
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents that the same ranks run as one micro-batch.

    ``documents`` are indices of the plan's lengths. On a ``ring`` of n hdp ranks each document is
    split into 2n chunks (``shard.chunks``); a ring of one rank has unsharded documents and sends no
    messages. ``cost``: seconds of forward and backward on each member. ``offload``: share of the
    layers with offloaded activations.
    """

    documents: tuple[int, ...]
    ring: tuple[int, ...]
    cost: float = 0.0
    offload: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Plan of a step: ``orders[r]`` are the unit indices of hdp rank r, None for a dummy.

    ``capacity``: maximum tokens of a rank in a micro-batch, which is padded to a ``multiple``;
    ``layers``: number of layers of a rank, of which a unit may offload a share (``Problem``).
    """

    lengths: Sequence[int]
    ranks: int
    mode: Mode
    units: tuple[Unit, ...]
    orders: tuple[tuple[int | None, ...], ...]
    capacity: int | None = None
    multiple: int = 1
    layers: int = 1

    def of_rank(self, rank: int) -> tuple[Unit | None, ...]:
        """Return the units of hdp rank ``rank`` in order."""
        return tuple(None if i is None else self.units[i] for i in self.orders[rank])

    def tokens(self, unit: Unit) -> int:
        """Return the tokens of the unit's documents, summed over all members."""
        return sum(self.lengths[document] for document in unit.documents)

    def member_tokens(self, unit: Unit, member: int) -> int:
        """Return the tokens of one member of the unit's ring, without padding."""
        lengths = [self.lengths[document] for document in unit.documents]
        return member_tokens(lengths, len(unit.ring), member)

    def describe(self) -> dict[str, Any]:
        """Return the properties of the plan as JSON; ``summary`` adds its costs."""
        degrees: Counter[int] = Counter()
        for unit in self.units:
            degrees[len(unit.ring)] += len(unit.documents)
        counts = [len(order) for order in self.orders]
        return {
            "mode": self.mode,
            "ranks": self.ranks,
            "documents": len(self.lengths),
            "tokens": int(sum(self.lengths)),
            "units": len(self.units),
            "waves": max(counts),
            "micro_batches": sum(counts),
            "dummies": sum(order.count(None) for order in self.orders),
            "degrees": {str(degree): degrees[degree] for degree in sorted(degrees)},
            "offloaded": sum(unit.offload * self.tokens(unit) for unit in self.units)
            / sum(self.lengths),
        }


def member_tokens(lengths: Sequence[int], degree: int, member: int) -> int:
    """Return the tokens of ``member`` of ``degree``: chunks j and 2n-1-j of 2n of each document.

    For example, ``member_tokens([8], 2, 0)`` is 4.
    """
    held = 0
    for length in lengths:
        short, longer = divmod(length, 2 * degree)
        held += 2 * short + (member < longer) + (2 * degree - 1 - member < longer)
    return held


def make_plan(
    lengths: Sequence[int] | Ints,
    ranks: int,
    context: ContextConfig,
    cost: CostModel,
    mode: Mode,
    *,
    layers: int,
    multiple: int = 1,
    round_count: int = 1,
    least: int = 1,
    pp: int = 1,
) -> Plan:
    """Assign documents to ranks by ``context.policy``; deterministic.

    ``layers``: layers of the smallest pipeline stage, for selective offload (see ``Problem``).
    ``multiple``: micro-batches are padded to a multiple of this number of tokens (tp); the capacity
    includes padding. Except in free mode the number of micro-batches of each rank is a multiple of
    ``round_count`` and at least ``least``, with dummies at the end; each rank has at least one
    micro-batch. ``pp``: pipeline ranks, each of which waits once for the most expensive
    micro-batch. For example, ``make_plan([4096, 512, 512], 2, context, cost, "free", layers=8)``.

    Raises:
        UserError: a document does not fit the ranks.
    """
    problem = Problem.of(lengths, ranks, context, cost, layers, multiple, pp)
    drafts, rings, orders = POLICIES[context.policy](problem, mode != "free")
    if mode == "free":
        counts = [max(len(order), 1) for order in orders]
    else:
        counts = [max(len(order), least) for order in orders]
        counts = [-(-count // round_count) * round_count for count in counts]
    if mode == "lockstep":
        counts = [max(counts)] * ranks
    return Plan(
        lengths=tuple(problem.lengths.tolist()),
        ranks=ranks,
        mode=mode,
        units=tuple(
            Unit(draft.documents, ring, draft.cost, draft.offload)
            for draft, ring in zip(drafts, rings, strict=True)
        ),
        orders=tuple(
            (*order, *[None] * (count - len(order)))
            for order, count in zip(orders, counts, strict=True)
        ),
        capacity=context.capacity_tokens,
        multiple=multiple,
        layers=layers,
    )
