"""Orders in which a ring has the same place in all its members: waves of units side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.parallel.hdp.packing import best_fit, even_bins
from allometry.parallel.hdp.problem import Draft, Placed, Problem


class Waves:
    """Units side by side: a rank has at most one in each wave.

    ``heights``: what a wave's dearest unit costs.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._loads = np.zeros(ranks)
        self._taken: list[np.ndarray] = []  # by wave: the unit of each rank, -1: none
        self._free: list[int] = []
        self.heights: list[float] = []
        self.rings: list[tuple[int, ...]] = []

    @property
    def holes(self) -> int:
        """Places without a unit."""
        return sum(self._free)

    def add(self, draft: Draft) -> None:
        """Put the next unit into the first wave with room, on the ranks with the least to do."""
        wave = next((w for w, free in enumerate(self._free) if free >= draft.degree), None)
        if wave is None:
            wave = self._open()
        ranks = np.flatnonzero(self._taken[wave] < 0)
        if draft.degree < len(ranks):
            least = np.argsort(self._loads[ranks], kind="stable")[: draft.degree]
            ranks = np.sort(ranks[least])
        self._set(wave, ranks, draft.cost)

    def fill(self, drafts: Sequence[Draft]) -> None:
        """Put units of one rank, dearest first, into the holes of the dearest waves, then anew."""
        waves = sorted(range(len(self._free)), key=lambda wave: (-self.heights[wave], wave))
        rest = iter(drafts)
        draft = next(rest, None)
        while draft is not None:
            wave = waves.pop(0) if waves else self._open()
            free = np.flatnonzero(self._taken[wave] < 0)
            # The dearest unit goes to the rank that has had the least.
            for rank in free[np.argsort(self._loads[free], kind="stable")]:
                self._set(wave, np.array([rank]), draft.cost)
                draft = next(rest, None)
                if draft is None:
                    break

    def orders(self) -> list[list[int | None]]:
        """What each rank runs, all equally much."""
        if not self._taken:
            return [[] for _ in range(self._ranks)]
        table = np.stack(self._taken, axis=1).tolist()
        return [[None if number < 0 else number for number in order] for order in table]

    def _open(self) -> int:
        self._taken.append(np.full(self._ranks, -1, dtype=np.int64))
        self._free.append(self._ranks)
        self.heights.append(0.0)
        return len(self._free) - 1

    def _set(self, wave: int, ranks: np.ndarray, cost: float) -> None:
        self._taken[wave][ranks] = len(self.rings)
        self._free[wave] -= len(ranks)
        self._loads[ranks] += cost
        self.heights[wave] = max(self.heights[wave], cost)
        self.rings.append(tuple(ranks.tolist()))


def place_in_turn(problem: Problem, drafts: Sequence[Draft]) -> Placed:
    """Place units as they come, each in the first wave with room."""
    waves = Waves(problem.ranks)
    for draft in drafts:
        waves.add(draft)
    return Placed(list(drafts), waves.rings, waves.orders())


def place_lockstep(problem: Problem, rings: Sequence[Draft], rest: Sequence[int]) -> Placed:
    """Place rings of like cost side by side, and the rest (longest first) in waves of equal cost.

    A step lasts as long as the sum of its waves' dearest units, so rings come dearest first (first
    fit by falling height, as in strip packing), and documents of one rank are spread over as many
    micro-batches as there are places in the waves that they need anyway.
    """
    rings = sorted(rings, key=lambda ring: (-ring.cost, ring.documents))
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
