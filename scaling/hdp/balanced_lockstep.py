"""The policy ``balanced`` with equal numbers of micro-batches on all ranks, arranged in waves.

A ring then has the same micro-batch index on all its members.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.scaling.hdp.packing import best_fit, even_bins
from allometry.scaling.hdp.problem import Draft, Ints, Placed, Problem
from allometry.scaling.hdp.ring_degrees import Choice, choices


class Waves:
    """Parallel units: a rank has at most one unit in each wave.

    ``heights``: cost of the most expensive unit of each wave.
    """

    def __init__(self, ranks: int) -> None:
        self._loads = np.zeros(ranks)
        self._taken: list[Ints] = []  # by wave: unit of each rank, -1: none
        self._shelves = Shelves(ranks)
        self.rings: list[tuple[int, ...]] = []

    @property
    def heights(self) -> list[float]:
        """Cost of the most expensive unit of each wave."""
        return self._shelves.heights

    @property
    def holes(self) -> int:
        """Number of free places."""
        return sum(self._shelves.free)

    def add(self, draft: Draft) -> None:
        """Add a unit to the first wave with room, on the least loaded ranks."""
        wave = self._shelves.add(draft.degree, draft.cost)
        if wave == len(self._taken):
            self._open()
        ranks = np.flatnonzero(self._taken[wave] < 0)
        if draft.degree < len(ranks):
            ranks = ranks[np.argsort(self._loads[ranks], kind="stable")[: draft.degree]]
        self._taken[wave][ranks] = len(self.rings)
        self._loads[ranks] += draft.cost
        self.rings.append(tuple(np.sort(ranks).tolist()))

    def fill(self, drafts: Sequence[Draft]) -> None:
        """Place single-rank units, most expensive first, in the most expensive waves.

        Further waves are opened when no free place is left.
        """
        known = np.argsort(-np.array(self.heights), kind="stable").tolist()
        start = 0
        while start < len(drafts):
            wave = known.pop(0) if known else self._open()
            ranks = np.flatnonzero(self._taken[wave] < 0)
            # The most expensive unit goes to the least loaded rank.
            ranks = ranks[np.argsort(self._loads[ranks], kind="stable")][: len(drafts) - start]
            stop = start + len(ranks)
            self._taken[wave][ranks] = np.arange(len(self.rings), len(self.rings) + len(ranks))
            self._loads[ranks] += [draft.cost for draft in drafts[start:stop]]
            self.rings += [(rank,) for rank in ranks.tolist()]
            start = stop

    def orders(self) -> list[list[int | None]]:
        """Return the units of each rank; all ranks have the same number."""
        if not self._taken:
            return [[] for _ in self._loads]
        table = np.stack(self._taken, axis=1).tolist()
        return [[None if number < 0 else number for number in order] for order in table]

    def _open(self) -> int:
        self._taken.append(np.full(self._loads.shape, -1, dtype=np.int64))
        return len(self._taken) - 1


class Shelves:
    """Widths and heights of waves; finds the first wave with room."""

    def __init__(self, ranks: int) -> None:
        self._ranks, self._first = ranks, 0
        self.free: list[int] = []
        self.heights: list[float] = []

    def add(self, degree: int, cost: float) -> int:
        """Return the wave of a new unit."""
        free = self.free
        while self._first < len(free) and not free[self._first]:
            self._first += 1
        for wave in range(self._first, len(free)):
            if free[wave] >= degree:
                break
        else:
            wave = len(free)
            free.append(self._ranks)
            self.heights.append(0.0)
        free[wave] -= degree
        self.heights[wave] = max(self.heights[wave], cost)
        return wave


def place_in_turn(problem: Problem, rings: Sequence[Draft], singles: Sequence[Draft]) -> Placed:
    """Place units in the given order, each in the first wave with room; single-rank units last."""
    waves = Waves(problem.ranks)
    for ring in rings:
        waves.add(ring)
    waves.fill(singles)
    return Placed([*rings, *singles], waves.rings, waves.orders())


def place_balanced_lockstep(problem: Problem) -> Placed:
    """Place rings of similar cost in one wave, and the other documents in balanced waves.

    The time of a step is the sum of its waves' most expensive units. Rings are therefore placed
    most expensive first (first-fit decreasing height, as in strip packing), and single-rank
    documents are spread over as many micro-batches as there are places in the waves that are needed
    anyway.
    """
    rings, long_first = _choose_rings(problem)
    rest = long_first.tolist()
    waves = Waves(problem.ranks)
    for ring in rings:
        waves.add(ring)
    sizes = problem.lengths.tolist()
    bins = best_fit(rest, sizes, problem.usable)
    more = -(-max(len(bins) - waves.holes, 0) // problem.ranks)
    places = min(waves.holes + more * problem.ranks, len(rest))
    even = even_bins(rest, sizes, problem.alone.tolist(), problem.usable, places)
    drafts = problem.packed(bins if even is None else even)
    drafts.sort(key=lambda draft: (-draft.cost, draft.documents))
    waves.fill(drafts)
    return Placed([*rings, *drafts], waves.rings, waves.orders())


def _choose_rings(problem: Problem) -> Choice:
    """Return the rings with the shortest total time of waves.

    A wave takes as long as its most expensive unit; in a pipeline, each further stage adds the time
    of the most expensive unit of all.
    """

    def seconds(choice: Choice) -> float:
        shelves = Shelves(problem.ranks)
        for ring in choice.rings:
            shelves.add(ring.degree, ring.cost)
        tokens = float(problem.tokens[choice.rest].sum())
        work = float(problem.alone[choice.rest].sum())
        full = work * problem.usable / max(tokens, 1.0)  # a full micro-batch
        waves = max(tokens / problem.usable - sum(shelves.free), 0.0) / problem.ranks
        heights = [*shelves.heights, min(full, work)]
        total = sum(shelves.heights) + max(waves * full, work / problem.ranks * (waves > 0))
        return total + (problem.pp - 1) * max(heights)

    return min(choices(problem), key=seconds)
