"""The policy ``pipeline_balanced``: each pipeline has documents of like lengths.

The shorter they are, the more micro-batches it has. A pipeline of p equal stages is done after the
sum of its micro-batches and p - 1 times its costliest one (arXiv 2104.04473). Pipelines only meet
in rings and at the end of a step, so costly documents are kept together: they cost the pipelines
that have some already no further bubbles, and the others, with one level of lengths each, take as
many more micro-batches as makes all end at once (arXiv 2502.21231, section 6, "PP-Balance").
"""

from __future__ import annotations

import numpy as np

from allometry.scaling.hdp.balanced_lockstep import Shelves
from allometry.scaling.hdp.cost import Floats
from allometry.scaling.hdp.packing import best_fit
from allometry.scaling.hdp.problem import Ints, Placed, Problem
from allometry.scaling.hdp.ring_degrees import Choice, choices

_SLACK = 1.02
"""Over the least length of a step: what pipelines may take of rings before others do."""


class _Pipelines:
    """Rings on pipelines, and how long each pipeline takes them.

    ``loads``: when a pipeline is done with its last ring, ``waits`` for other members included;
    ``costliest``: its costliest micro-batch, at least a ``full`` one of the documents of one rank.
    """

    def __init__(self, problem: Problem, choice: Choice) -> None:
        self.problem, self.choice, self.ranks = problem, choice, problem.ranks
        self.waves: list[Ints] = []  # by wave: the ring of each pipeline, -1: none
        self.rings: list[tuple[int, ...]] = []
        self.loads, self.waits = np.zeros(self.ranks), np.zeros(self.ranks)
        self.work = float(problem.alone[choice.rest].sum())
        tokens = max(float(problem.tokens[choice.rest].sum()), 1.0)
        self.full = self.work * min(problem.usable / tokens, 1.0)
        # No placement undercuts this.
        pp, rings = problem.pp, choice.rings
        total = self.work + sum(ring.cost * ring.degree for ring in rings)
        alone = pp * max((ring.cost for ring in rings), default=0.0)
        self.least = max(total / self.ranks + (pp - 1) * self.full, alone)
        self.costliest: Floats = np.full(self.ranks, self.full)
        self.shelves = Shelves(self.ranks)

    def place(self) -> float:
        """Place all rings and return the level that the others make."""
        for ring in self.choice.rings:
            self._place(ring.degree, ring.cost, _SLACK * self.least)
        return self.level

    def order(self, rank: int) -> list[int | None]:
        """What a pipeline runs up to its last ring, None where its rings leave a hole."""
        order = [None if wave[rank] < 0 else int(wave[rank]) for wave in self.waves]
        while order and order[-1] is None:
            order.pop()
        return order

    @property
    def ends(self) -> Floats:
        """When each pipeline is done with its rings; documents in holes take it no longer."""
        filled = np.array([self.order(rank).count(None) for rank in range(self.ranks)])
        waits = np.minimum(self.waits, self.full * filled)
        return self.loads - waits + (self.problem.pp - 1) * self.costliest

    @property
    def level(self) -> float:
        """When all are done, if the others level them."""
        ends = np.sort(self.ends)
        # The level at which the pipelines below it have room for everything.
        filled = (np.cumsum(ends) + self.work) / np.arange(1, len(ends) + 1)
        below = np.flatnonzero(np.append(ends[1:], np.inf) >= filled)[0]
        return float(max(filled[below], ends[-1]))

    def _place(self, degree: int, cost: float, goal: float) -> None:
        """Put a ring on the fullest pipelines that still end in time, else on the emptiest.

        Of those that are free in its wave: without waves rings would form staircases.
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
    """Place rings, costliest first; then each pipeline takes the next of the rest.

    The pipelines with the costliest rings come first and get the longest documents. What a pipeline
    has before its last ring stands in the holes that keep rings at one place.
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
    """Cut documents in their order, where each pipeline in turn comes up to the level of all."""
    costs = problem.alone[rest]
    middles = np.cumsum(costs) - costs / 2
    cuts = np.searchsorted(middles, np.cumsum(rooms)[:-1])
    return [part.tolist() for part in np.split(rest, cuts)]


def _filled(order: list[int | None], units: range) -> list[int | None]:
    """Put units into holes, then at the end."""
    rest = iter(units)
    return [*(next(rest, None) if unit is None else unit for unit in order), *rest]
