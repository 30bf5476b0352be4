"""Degrees of rings where ranks run micro-batches side by side, so that none waits for a ring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from allometry.scaling.hdp.problem import Draft, Ints, Problem

SHARES = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.025)
"""Of the ideal step: what is tried as the longest that a ring may take."""


class Choice(NamedTuple):
    """Units of the documents that are long or costly, costliest first, and the others."""

    rings: list[Draft]
    rest: Ints


def choices(problem: Problem) -> Iterator[Choice]:
    """Yield what each share makes of the documents; the same twice only once."""
    order = problem.descending
    long = problem.lengths[order] > problem.usable
    before: Ints | None = None
    for share in SHARES:
        goal = share * problem.ideal
        documents = order[long | (problem.alone[order] > goal)]
        degrees = problem.degrees(documents, goal)
        alone = (degrees == 1) & (problem.lengths[documents] <= problem.usable)
        all_degrees = np.zeros(len(order), dtype=np.int64)
        all_degrees[documents[~alone]] = degrees[~alone]
        if before is not None and np.array_equal(before, all_degrees):
            continue
        before = all_degrees
        rings = problem.rings(documents[~alone], degrees[~alone])
        rings.sort(key=lambda ring: (-ring.cost, ring.documents))
        yield Choice(rings, order[all_degrees[order] == 0])
