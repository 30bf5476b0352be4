"""The policy ``balanced`` in free mode: ranks run different numbers of units and finish together.

Long documents are placed first. A ring may have any size, so each document gets the fewest ranks on
which it finishes with the step: few long rings hide their communication better than many short
ones. Single-rank documents then fill the time in which ranks wait for rings, and balance the ends.

The rings of a rank are in order of placement, the same for all members, so without a pipeline two
ranks cannot deadlock.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from allometry.scaling.hdp.cost import Floats
from allometry.scaling.hdp.packing import first_fit
from allometry.scaling.hdp.problem import Ints, Placed, Problem

COSTLY_SHARE = 0.3
"""Fraction of a step that a document must take on the fewest possible ranks to get an optimized
degree.
"""
STRETCHES = (1.01, 1.03, 1.06, 1.1, 1.2, 1.4)
"""Step lengths to try, relative to the lower bound; the first feasible one is used."""
_SOON = 1.05
"""Tolerance over the earliest end of a document that cannot end with the step; saves ranks."""


class Gap(NamedTuple):
    """Seconds that a rank waits before its ring at index ``place`` of its order."""

    seconds: float
    rank: int
    place: int


class Timeline:
    """Documents scheduled on ranks; each document goes to the ranks that are free first.

    ``shares[rank, place]``: single-rank documents before the ring at this index.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._least_gap = float(problem.alone.min())
        self.ends: Floats = np.zeros(problem.ranks)
        self.orders: list[list[int]] = [[] for _ in range(problem.ranks)]
        self.rings: list[tuple[int, tuple[int, ...]]] = []  # document, members
        self.shares: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.gaps: list[Gap] = []

    def place_costly(self, documents: Sequence[int], goal: float) -> None:
        """Place documents on the fewest ranks with which each ends by ``goal``, or soon after."""
        problem = self._problem
        for document in documents:
            tokens, pairs = problem.tokens[document], problem.pairs[document]
            fewest, most = problem.degree_range(document)
            if fewest == 1:
                # The usual case if there are many documents.
                rank = int(self.ends.argmin())
                seconds = float(problem.alone[document])
                if self.ends[rank] + seconds <= goal or most == 1:
                    self._give(document, np.array([rank]), seconds)
                    continue
            soonest = np.argsort(self.ends, kind="stable")
            degrees = np.arange(fewest, most + 1)
            seconds_n = problem.cost.times(tokens, pairs, degrees)
            ends = self.ends[soonest[degrees - 1]] + seconds_n
            choice = int(np.flatnonzero(ends <= max(goal, _SOON * float(ends.min())))[0])
            self._give(document, soonest[: fewest + choice], float(seconds_n[choice]))

    def place_small(self, documents: Ints) -> None:
        """Place rings with the fewest possible ranks on the ranks that are free first."""
        problem = self._problem
        degrees = problem.fewest[documents]
        seconds = problem.cost.times(problem.tokens[documents], problem.pairs[documents], degrees)
        soonest = [(end, rank) for rank, end in enumerate(self.ends.tolist())]
        heapq.heapify(soonest)
        order = np.lexsort((documents, -seconds, -degrees))
        columns = (x[order].tolist() for x in (documents, degrees, seconds))
        for document, degree, cost in zip(*columns, strict=True):
            ring = [heapq.heappop(soonest) for _ in range(degree)]
            start = ring[-1][0]
            for end, rank in ring:
                self._note(rank, start - end)
                heapq.heappush(soonest, (start + cost, rank))
            self._enter(document, sorted(rank for _, rank in ring))
        for end, rank in soonest:
            self.ends[rank] = end

    def estimate(self, rest: float, small: float) -> float:
        """Return the step time if ``rest`` rank-seconds fill gaps and balance the ends."""
        gaps = sum(gap.seconds for gap in self.gaps)
        work = float(self.ends.sum()) - min(gaps, rest) + rest + small
        return max(float(self.ends.max()), work / len(self.orders))

    def _give(self, document: int, ranks: Ints, seconds: float) -> None:
        start = float(self.ends[ranks].max())
        if len(ranks) == 1 and self._problem.lengths[document] <= self._problem.usable:
            rank = int(ranks[0])
            self.shares[rank, len(self.orders[rank])].append(document)
        else:
            for rank in np.sort(ranks).tolist():
                self._note(rank, start - float(self.ends[rank]))
            self._enter(document, np.sort(ranks).tolist())
        self.ends[ranks] = start + seconds

    def _note(self, rank: int, seconds: float) -> None:
        if seconds >= self._least_gap:
            self.gaps.append(Gap(seconds, rank, len(self.orders[rank])))

    def _enter(self, document: int, members: Sequence[int]) -> None:
        for rank in members:
            self.orders[rank].append(len(self.rings))
        self.rings.append((document, tuple(members)))


def place_balanced_free(problem: Problem) -> Placed:
    """Assign documents so that all ranks finish at the same time, as early as possible."""
    order = problem.descending
    small_s = problem.cost.times(problem.tokens, problem.pairs, problem.fewest)
    costly = small_s[order] > COSTLY_SHARE * problem.ideal
    long = problem.lengths[order] > problem.usable
    small, rest = order[long & ~costly], order[~long & ~costly]
    works = (float((problem.fewest * small_s)[x].sum()) for x in (small, rest))
    small_work, rest_work = works
    least = problem.floor(order[costly], rest_work + small_work)
    best: Timeline | None = None
    seconds = np.inf
    for stretch in STRETCHES:
        timeline = Timeline(problem)
        timeline.place_costly(order[costly].tolist(), stretch * least)
        estimate = timeline.estimate(rest_work, small_work)
        if estimate < seconds:
            best, seconds = timeline, estimate
        if seconds <= stretch * least:
            break
    assert best is not None
    best.place_small(small)
    _share_out(problem, best, rest.tolist())
    return _assemble(problem, best)


def _share_out(problem: Problem, timeline: Timeline, rest: Sequence[int]) -> None:
    """Assign documents, longest first, to the widest gaps or to the ranks that finish first.

    A gap that is too short for a document is kept for shorter ones.
    """
    seconds = problem.alone.tolist()
    shares, orders = timeline.shares, timeline.orders
    gaps = [(-gap.seconds, number) for number, gap in enumerate(timeline.gaps)]
    heapq.heapify(gaps)
    soonest = [(end, rank) for rank, end in enumerate(timeline.ends.tolist())]
    heapq.heapify(soonest)
    for document in rest:
        cost = seconds[document]
        if gaps and -gaps[0][0] >= cost:
            room, number = gaps[0]
            gap = timeline.gaps[number]
            shares[gap.rank, gap.place].append(document)
            heapq.heapreplace(gaps, (room + cost, number))
        else:
            end, rank = soonest[0]
            shares[rank, len(orders[rank])].append(document)
            heapq.heapreplace(soonest, (end + cost, rank))


def _assemble(problem: Problem, timeline: Timeline) -> Placed:
    """Pack each share separately and insert the units in the order of each rank."""
    sizes = problem.lengths.tolist()
    documents = np.array([document for document, _ in timeline.rings], dtype=np.int64)
    degrees = np.array([len(members) for _, members in timeline.rings], dtype=np.int64)
    rings = [members for _, members in timeline.rings]
    drafts = problem.rings(documents, degrees)
    orders: list[list[int | None]] = [list(order) for order in timeline.orders]
    bins: list[list[int]] = []
    # From the last place to the first, so that earlier places stay valid.
    for (rank, place), share in sorted(timeline.shares.items(), reverse=True):
        made = first_fit(share, sizes, problem.usable)
        start = len(drafts) + len(bins)
        orders[rank][place:place] = range(start, start + len(made))
        bins += made
        rings += [(rank,)] * len(made)
    return Placed([*drafts, *problem.packed(bins)], rings, orders)
