"""Ranks that run their units in turn, as many as each has: rings first where they meet, documents
of one rank between them and at the end.

A rank's rings are in the order in which they were placed, the same for all members, so without a
pipeline no two ranks wait for one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from allometry.parallel.hdp.cost import Floats
from allometry.parallel.hdp.packing import first_fit
from allometry.parallel.hdp.problem import Draft, Placed, Problem

_MANY = 12
"""Members from which on picking the least loaded ranks from an array is faster than from a heap."""


class Gap(NamedTuple):
    """Seconds that a rank waits before its ring at ``place`` of its order."""

    seconds: float
    rank: int
    place: int


class Timeline:
    """Rings on ranks, each at once on those that are free soonest."""

    def __init__(self, ranks: int) -> None:
        self.ends: Floats = np.zeros(ranks)
        self.orders: list[list[int]] = [[] for _ in range(ranks)]
        self.gaps: list[Gap] = []
        self.rings: list[tuple[int, ...]] = []

    def place(self, rings: Sequence[Draft], least_gap: float) -> None:
        """Place rings in their order, which is that of falling degrees; keep gaps worth filling."""
        many = next((i for i, ring in enumerate(rings) if ring.degree < _MANY), len(rings))
        for ring in rings[:many]:
            self._place_large(ring, least_gap)
        soonest = [(end, rank) for rank, end in enumerate(self.ends.tolist())]
        heapq.heapify(soonest)
        for ring in rings[many:]:
            found = [heapq.heappop(soonest) for _ in range(ring.degree)]
            start = found[-1][0]
            for end, rank in found:
                self._note(rank, start - end, least_gap)
                heapq.heappush(soonest, (start + ring.cost, rank))
            self._give(tuple(sorted(rank for _, rank in found)))
        for end, rank in soonest:
            self.ends[rank] = end

    def _place_large(self, ring: Draft, least_gap: float) -> None:
        members = np.sort(np.argsort(self.ends, kind="stable")[: ring.degree])
        ends = self.ends[members]
        start = float(ends.max())
        for place in np.flatnonzero(start - ends >= least_gap).tolist():
            self._note(int(members[place]), start - float(ends[place]), least_gap)
        self.ends[members] = start + ring.cost
        self._give(tuple(members.tolist()))

    def _note(self, rank: int, seconds: float, least_gap: float) -> None:
        if seconds >= least_gap > 0:
            self.gaps.append(Gap(seconds, rank, len(self.orders[rank])))

    def _give(self, members: tuple[int, ...]) -> None:
        number = len(self.rings)
        self.rings.append(members)
        for rank in members:
            self.orders[rank].append(number)


def place_free(problem: Problem, rings: Sequence[Draft], rest: Sequence[int]) -> Placed:
    """Place rings, then share documents of one rank out so that all ranks end at once.

    ``rest``: those documents, longest first. They fill what ranks wait for rings, then go to
    whichever rank ends soonest; each share is packed for itself.
    """
    rings = sorted(rings, key=lambda ring: (-ring.degree, -ring.cost, ring.documents))
    least = float(problem.alone[rest[-1]]) if len(rest) else 0.0
    timeline = Timeline(problem.ranks)
    timeline.place(rings, least)
    filling, last = _share_out(problem.alone.tolist(), timeline, rest)
    return _assemble(problem, rings, timeline, filling, last)


def _share_out(
    seconds: Sequence[float], timeline: Timeline, rest: Sequence[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the documents of each gap and those of each rank's end.

    Documents come longest first, so whatever fits goes into the widest gap; a gap too narrow waits
    for shorter ones.
    """
    filling: list[list[int]] = [[] for _ in timeline.gaps]
    last: list[list[int]] = [[] for _ in timeline.orders]
    gaps = [(-gap.seconds, number) for number, gap in enumerate(timeline.gaps)]
    heapq.heapify(gaps)
    soonest = [(end, rank) for rank, end in enumerate(timeline.ends.tolist())]
    heapq.heapify(soonest)
    for document in rest:
        cost = seconds[document]
        if gaps and -gaps[0][0] >= cost:
            room, number = gaps[0]
            filling[number].append(document)
            heapq.heapreplace(gaps, (room + cost, number))
        else:
            end, rank = soonest[0]
            last[rank].append(document)
            heapq.heapreplace(soonest, (end + cost, rank))
    return filling, last


def _assemble(
    problem: Problem,
    rings: Sequence[Draft],
    timeline: Timeline,
    filling: Sequence[Sequence[int]],
    last: Sequence[Sequence[int]],
) -> Placed:
    """Pack every share and put the units in each rank's order."""
    sizes = problem.lengths.tolist()
    bins: list[list[int]] = []
    owners: list[tuple[int,]] = []
    numbers: dict[tuple[int, int], range] = {}  # by rank and place: units that come before it

    def pack(rank: int, place: int, share: Sequence[int]) -> None:
        made = first_fit(share, sizes, problem.usable)
        start = len(rings) + len(bins)
        numbers[rank, place] = range(start, start + len(made))
        bins.extend(made)
        owners.extend([(rank,)] * len(made))

    for gap, share in zip(timeline.gaps, filling, strict=True):
        if share:
            pack(gap.rank, gap.place, share)
    for rank, share in enumerate(last):
        if share:
            pack(rank, len(timeline.orders[rank]), share)
    before: dict[int, list[tuple[int, range]]] = {}
    for (rank, place), units in numbers.items():
        before.setdefault(rank, []).append((place, units))
    orders = [_inserted(order, before.get(rank, ())) for rank, order in enumerate(timeline.orders)]
    return Placed([*rings, *problem.packed(bins)], [*timeline.rings, *owners], orders)


def _inserted(order: Sequence[int], units: Iterable[tuple[int, range]]) -> list[int | None]:
    """Put units before the places of an order that they are meant for."""
    found: list[int | None] = list(order)
    for place, numbers in sorted(units, key=lambda item: -item[0]):
        found[place:place] = numbers
    return found
