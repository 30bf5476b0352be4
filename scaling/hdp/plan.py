"""Which ranks hold which documents of a global batch, and in which order they run them.

Pure and without torch: every rank computes the same plan from the same lengths.
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
"""free: each rank runs its units in turn, as many as it has. aligned: a ring has the same place in
the orders of all its members. lockstep: and all orders are of one length."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Documents that the same ranks run as one micro-batch.

    ``documents`` number the lengths of the plan. On a ``ring`` of n hdp ranks each document is cut
    into 2n chunks (``shard.chunks``); a ring of one holds them whole and sends nothing. ``cost``:
    seconds of forward and backward on each member. ``offload``: share of the layers whose kept
    activations wait on the host.
    """

    documents: tuple[int, ...]
    ring: tuple[int, ...]
    cost: float = 0.0
    offload: float = 0.0


@dataclass(frozen=True)
class Plan:
    """One step: ``orders[r]`` are the units that hdp rank r runs, by number, None for a dummy.

    ``capacity``: tokens that a rank may hold in a micro-batch, which is filled up to a
    ``multiple``; ``layers``: those of a rank, of which a unit may offload a share (``Problem``).
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
        """What hdp rank ``rank`` runs, in order."""
        return tuple(None if i is None else self.units[i] for i in self.orders[rank])

    def tokens(self, unit: Unit) -> int:
        """Tokens of the unit's documents, on all its members together."""
        return sum(self.lengths[document] for document in unit.documents)

    def member_tokens(self, unit: Unit, member: int) -> int:
        """Tokens that one member of the unit's ring holds, without filling."""
        lengths = [self.lengths[document] for document in unit.documents]
        return member_tokens(lengths, len(unit.ring), member)

    def describe(self) -> dict[str, Any]:
        """Return what the plan does, as JSON; ``summary`` adds what it costs."""
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
    """Return how many tokens ``member`` of ``degree`` holds: chunks j and 2n-1-j of 2n of each."""
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
    """Share documents out to ranks, by ``context.policy``. Deterministic.

    ``layers``: of the smallest pipeline stage, for selective offload (see ``Problem``).
    ``multiple``: that a micro-batch's tokens are filled up to (tp); the capacity holds after that.
    Except in free mode each rank's number of micro-batches is a multiple of ``round_count``, and at
    least ``least``, by dummies at the end; no rank is without a micro-batch. ``pp``: pipeline
    ranks, each of which waits once for the costliest micro-batch.

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
