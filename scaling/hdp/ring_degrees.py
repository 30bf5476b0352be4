"""Ring sizes for ranks that run micro-batches in parallel, chosen so that ranks do not wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from allometry.scaling.hdp.problem import Draft, Ints, Problem

SHARES = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.025)
"""Tried limits for the time of a ring, relative to the ideal step."""


class Choice(NamedTuple):
    """Units of the long or expensive documents, most expensive first, and the other documents."""

    rings: list[Draft]
    rest: Ints


def choices(problem: Problem) -> Iterator[Choice]:
    """Yield a choice for each share; repeated results are skipped."""
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
