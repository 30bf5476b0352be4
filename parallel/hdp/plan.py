"""Which ranks hold which documents of a global batch, and in which order they run them.

Pure and without torch: every rank computes the same plan from the same lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    """One step: ``orders[r]`` are the units that hdp rank r runs, by number, None for a dummy."""

    lengths: Sequence[int]
    ranks: int
    mode: Mode
    units: tuple[Unit, ...]
    orders: tuple[tuple[int | None, ...], ...]

    def of_rank(self, rank: int) -> tuple[Unit | None, ...]:
        """What hdp rank ``rank`` runs, in order."""
        return tuple(None if i is None else self.units[i] for i in self.orders[rank])
