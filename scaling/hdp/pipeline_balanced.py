"""The policy ``pipeline_balanced``: each pipeline has documents of similar lengths.

Pipelines with shorter documents run more micro-batches. A pipeline of p equal stages takes the sum
of its micro-batches plus p - 1 times its most expensive one (arXiv 2104.04473). Pipelines
synchronize only in rings and at the end of a step. Expensive documents are therefore kept together:
they add no bubble to pipelines that already have expensive documents. The other pipelines, each
with documents of one length level, run enough additional micro-batches for all to finish together
(arXiv 2502.21231, section 6, "PP-Balance").
"""

from __future__ import annotations

import numpy as np

from allometry.scaling.hdp.balanced_lockstep import Shelves
from allometry.scaling.hdp.cost import Floats
from allometry.scaling.hdp.packing import best_fit
from allometry.scaling.hdp.problem import Ints, Placed, Problem
from allometry.scaling.hdp.ring_degrees import Choice, choices

_SLACK = 1.02
"""Time limit for rings on a preferred pipeline, relative to the lower bound of the step."""


class _Pipelines:
    """Rings on pipelines, and the time of each pipeline.

    ``loads``: end of a pipeline's last ring, including ``waits`` for other members; ``costliest``:
    its most expensive micro-batch, at least a ``full`` one of single-rank documents.
    """

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice, self.ranks = problem, choice, problem.ranks
        self.waves: list[Ints] = []  # by wave: ring of each pipeline, -1: none
        self.rings: list[tuple[int, ...]] = []
        self.loads, self.waits = np.zeros(self.ranks), np.zeros(self.ranks)
        self.work = float(problem.alone[choice.rest].sum())
        tokens = max(float(problem.tokens[choice.rest].sum()), 1.0)
        self.full = self.work * min(problem.usable / tokens, 1.0)
        # A lower bound of every placement.
        pp, rings = problem.pp, choice.rings
        total = self.work + sum(ring.cost * ring.degree for ring in rings)
        alone = pp * max((ring.cost for ring in rings), default=0.0)
        self.least = max(total / self.ranks + (pp - 1) * self.full, alone)
        self.costliest: Floats = np.full(self.ranks, self.full)
        self.shelves = Shelves(self.ranks)

    def place(self) -> float:
        """Place all rings; return the level after filling with the other documents."""
        for ring in self.choice.rings:
            self._place(ring.degree, ring.cost, _SLACK * self.least)
        return self.level

    def order(self, rank: int) -> list[int | None]:
        """Return the units of a pipeline up to its last ring; None: a free place between rings."""
        order = [None if wave[rank] < 0 else int(wave[rank]) for wave in self.waves]
        while order and order[-1] is None:
            order.pop()
        return order

    @property
    def ends(self) -> Floats:
        """End of each pipeline's rings; documents in free places do not add time."""
        filled = np.array([self.order(rank).count(None) for rank in range(self.ranks)])
        waits = np.minimum(self.waits, self.full * filled)
        return self.loads - waits + (self.problem.pp - 1) * self.costliest

    @property
    def level(self) -> float:
        """Time at which all pipelines finish, if the other documents balance them."""
        ends = np.sort(self.ends)
        # The level at which the pipelines below it have room for all other documents.
        filled = (np.cumsum(ends) + self.work) / np.arange(1, len(ends) + 1)
        below = np.flatnonzero(np.append(ends[1:], np.inf) >= filled)[0]
        return float(max(filled[below], ends[-1]))

    def _place(self, degree: int, cost: float, goal: float) -> None:
        """Put a ring on the fullest pipelines that still end in time, else on the emptiest.

        Only pipelines that are free in the ring's wave are used: without waves, rings would be
        staggered.
        """
        wave = self.shelves.add(degree, cost)
        if wave == len(self.waves):
            self.waves.append(np.full(self.ranks, -1, dtype=np.int64))
        costliest = np.maximum(self.costliest, cost)
        ends = self.loads + cost + (self.problem.pp - 1) * costliest
        free = self.waves[wave] < 0
        ranks = np.flatnonzero(free & (ends <= goal))
        if len(ranks) >= degree:
            ranks = ranks[np.argsort(-self.loads[ranks], kind="stable")[:degree]]
        else:
            ranks = np.flatnonzero(free)
            ranks = ranks[np.argsort(ends[ranks], kind="stable")[:degree]]
        start = self.loads[ranks].max()
        self.waits[ranks] += start - self.loads[ranks]
        self.loads[ranks] = start + cost
        self.costliest[ranks] = costliest[ranks]
        self.waves[wave][ranks] = len(self.rings)
        self.rings.append(tuple(np.sort(ranks).tolist()))


def place_pipeline_balanced(problem: Problem) -> Placed:
    """Place rings, most expensive first; then assign the other documents to pipelines in turn.

    Pipelines with the most expensive rings come first and get the longest documents. The units of a
    pipeline before its last ring use the free places that align its rings.
    """
    tried = sorted(
        (_Pipelines(problem, choice) for choice in choices(problem)),
        key=lambda pipelines: pipelines.least,
    )
    best, level = tried[0], tried[0].place()
    for each in tried[1:]:
        if each.least < level and each.place() < level:
            best, level = each, each.level
    ranks = np.argsort(-best.costliest, kind="stable")
    shares = _cut(problem, best.choice.rest, np.maximum(level - best.ends[ranks], 0.0))
    sizes = problem.lengths.tolist()
    drafts, rings = list(best.choice.rings), best.rings
    orders = [best.order(rank) for rank in range(problem.ranks)]
    for rank, share in zip(ranks.tolist(), shares, strict=True):
        made = problem.packed(best_fit(share, sizes, problem.usable))
        made.sort(key=lambda draft: (-draft.cost, draft.documents))
        start = len(drafts)
        drafts += made
        rings += [(rank,)] * len(made)
        orders[rank] = _filled(orders[rank], range(start, start + len(made)))
    return Placed(drafts, rings, orders)


def _cut(problem: Problem, rest: Ints, rooms: Floats) -> list[list[int]]:
    """Split documents in order, where each pipeline in turn reaches the common level."""
    costs = problem.alone[rest]
    middles = np.cumsum(costs) - costs / 2
    cuts = np.searchsorted(middles, np.cumsum(rooms)[:-1])
    return [part.tolist() for part in np.split(rest, cuts)]


def _filled(order: list[int | None], units: range) -> list[int | None]:
    """Put units into free places, then at the end."""
    rest = iter(units)
    return [*(next(rest, None) if unit is None else unit for unit in order), *rest]
