"""Pipelines with documents of like lengths, and the more micro-batches the shorter these are.

A pipeline's bubbles grow with the spread of its micro-batches, and pipelines only meet in rings and
at the end of a step; so each gets one level of lengths, and as many micro-batches as take it the
time of the others (arXiv 2502.21231, section 6, "PP-Balance").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allometry.parallel.hdp.cost import Floats
from allometry.parallel.hdp.packing import best_fit
from allometry.parallel.hdp.problem import Draft, Ints, Placed, Problem
from allometry.parallel.hdp.waves import Waves


def place_levels(problem: Problem, rings: Sequence[Draft], rest: Ints) -> Placed:
    """Place rings, dearest first, in waves; then each pipeline takes the next of the rest.

    ``rest`` is longest first. The pipelines with the dearest rings come first and get the longest
    documents. What a pipeline has before its last ring stands in the holes of these waves.
    """
    waves = Waves(problem.ranks)
    for ring in rings:
        waves.add(ring)
    orders = [_trimmed(order) for order in waves.orders()]
    costs = np.array([ring.cost for ring in rings])
    loads = np.array([sum(costs[i] for i in order if i is not None) for order in orders])
    dearest = [max((costs[i] for i in order if i is not None), default=0.0) for order in orders]
    line = np.argsort(-np.array(dearest), kind="stable")
    shares = _level(problem, rest, loads[line])
    sizes = problem.lengths.tolist()
    drafts, owners = list(rings), list(waves.rings)
    for rank, share in zip(line.tolist(), shares, strict=True):
        made = problem.packed(best_fit(share, sizes, problem.usable))
        start = len(drafts)
        drafts += made
        owners += [(rank,)] * len(made)
        orders[rank] = _filled(orders[rank], range(start, start + len(made)))
    return Placed(drafts, owners, orders)


def _level(problem: Problem, rest: Ints, loads: Floats) -> list[list[int]]:
    """Cut the line of documents where each pipeline in turn has come up to the common level."""
    costs = problem.alone[rest]
    order = np.sort(loads)
    # The level at which the pipelines below it have room for everything.
    filled = (np.cumsum(order) + costs.sum()) / np.arange(1, len(order) + 1)
    below = np.flatnonzero(np.append(order[1:], np.inf) >= filled)[0]
    rooms = np.maximum(filled[below] - loads, 0.0)
    middles = np.cumsum(costs) - costs / 2
    cuts = np.searchsorted(middles, np.cumsum(rooms)[:-1])
    return [part.tolist() for part in np.split(rest, cuts)]


def _trimmed(order: list[int | None]) -> list[int | None]:
    """Leave out what comes after the last ring."""
    while order and order[-1] is None:
        order.pop()
    return order


def _filled(order: list[int | None], units: range) -> list[int | None]:
    """Put units into holes, then at the end."""
    rest = iter(units)
    return [*(next(rest, None) if unit is None else unit for unit in order), *rest]
