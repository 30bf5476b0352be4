"""Policies of ``parallel.context``: grouping of documents, ring sizes, and placement on ranks.

Each policy takes a problem and a mode and returns units, their rings and the order of each rank.
Ties are resolved by index, so every rank computes the same plan. ``static`` and ``naive`` are the
methods of other trainers, used for comparison; ``static`` needs no planner.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

from allometry.scaling.hdp.balanced_free import place_balanced_free
from allometry.scaling.hdp.balanced_lockstep import place_balanced_lockstep, place_in_turn
from allometry.scaling.hdp.packing import best_fit
from allometry.scaling.hdp.pipeline_balanced import place_pipeline_balanced
from allometry.scaling.hdp.problem import Placed, Problem


def static(problem: Problem, aligned: bool) -> Placed:
    """Give every document ``degree`` consecutive ranks, even short ones, as other trainers do.

    Documents are packed into micro-batches of degree x capacity tokens, each sharded over the ranks
    of a group; all ranks of a group run its micro-batches in the same order.
    """
    degree = problem.context.degree
    sizes = (-(-problem.lengths // degree)).tolist()
    drafts = problem.packed(
        best_fit(problem.descending.tolist(), sizes, problem.usable), degree=degree
    )
    drafts.sort(key=lambda draft: (-draft.cost, draft.documents))
    groups = [range(first, first + degree) for first in range(0, problem.ranks, degree)]
    loads = [(0.0, number) for number in range(len(groups))]
    orders: list[list[int | None]] = [[] for _ in range(problem.ranks)]
    rings = []
    for number, draft in enumerate(drafts):
        load, group = loads[0]
        heapq.heapreplace(loads, (load + draft.cost, group))
        rings.append(tuple(groups[group]))
        for rank in groups[group]:
            orders[rank].append(number)
    return Placed(drafts, rings, orders)


def naive(problem: Problem, aligned: bool) -> Placed:
    """Give each document the fewest ranks on which it fits (arXiv 2502.21231, alg. 1).

    Documents that fit one rank are packed. Each unit goes to the ranks with the fewest units so
    far, regardless of cost.
    """
    order = problem.descending
    long = order[problem.lengths[order] > problem.usable]
    short = order[problem.lengths[order] <= problem.usable]
    rings = problem.rings(long, problem.fewest[long])
    bins = best_fit(short.tolist(), problem.lengths.tolist(), problem.usable)
    singles = problem.packed(bins)
    if aligned:
        return place_in_turn(problem, rings, singles)
    counts = [(0, rank) for rank in range(problem.ranks)]
    orders: list[list[int | None]] = [[] for _ in range(problem.ranks)]
    members = []
    for number, draft in enumerate([*rings, *singles]):
        ring = [heapq.heappop(counts) for _ in range(draft.degree)]
        members.append(tuple(sorted(rank for _, rank in ring)))
        for count, rank in ring:
            heapq.heappush(counts, (count + 1, rank))
            orders[rank].append(number)
    return Placed([*rings, *singles], members, orders)


POLICIES: Mapping[str, Callable[[Problem, bool], Placed]] = {
    "static": static,
    "naive": naive,
    "balanced": lambda problem, aligned: (
        place_balanced_lockstep(problem) if aligned else place_balanced_free(problem)
    ),
    "pipeline_balanced": lambda problem, _: place_pipeline_balanced(problem),
}
