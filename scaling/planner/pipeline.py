"""What a pipeline loses: bubbles of its schedules."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from allometry.scaling.planner.cases import SCHEDULES
from allometry.scaling.planner.constants import Floats


def bubble(
    schedule: ArrayLike,
    stages: ArrayLike,
    chunks: ArrayLike,
    forward: ArrayLike,
    backward_input: ArrayLike,
    backward_weight: ArrayLike,
) -> Floats:
    """Seconds that a rank of a pipeline of equal stages is idle in a step.

    The times are a rank's for one micro-batch, all its ``chunks`` together. 1F1B (arXiv 2006.09503)
    loses (p-1)(F+B+W), interleaved (arXiv 2104.04473) that over the chunks, ZB-H1 (p-1)(F+B-W),
    ZB-H2 (p-1)(F+B-2W) (arXiv 2401.10241, table 2), never less than nothing; ZBV loses nothing for
    F=B=W, else what the longest of the three has over the shortest, (p-1) times over 2 chunks: an
    approximation.
    """
    schedule = np.asarray(schedule)
    assert np.isin(schedule, SCHEDULES).all(), schedule
    p1 = np.asarray(stages, dtype=float) - 1
    f, b, w = (np.asarray(x, dtype=float) for x in (forward, backward_input, backward_weight))
    uneven = np.maximum(np.maximum(f, b), w) - np.minimum(np.minimum(f, b), w)
    each = np.select(
        [schedule == name for name in SCHEDULES],
        [f + b + w, (f + b + w) / np.asarray(chunks), f + b - w, f + b - 2 * w, uneven / 2],
    )
    return np.asarray(p1 * np.maximum(each, 0.0))


def bottleneck(layer: Floats, layers: Floats, head: Floats, p: Floats, even: Floats) -> Floats:
    """Seconds of the slowest stage for a micro-batch; head: the last stage's besides its layers.

    ``even``: every stage has the same number of layers; else the last has as many as make the
    slowest stage fastest, and the others share the rest.
    """
    equal = np.maximum(np.ceil(layers / p) * layer, layers / p * layer + head)
    # Others' layers K: K layers take longer with K, what is left for the last stage is less.
    others = np.maximum(p - 1, 1)
    crossing, most = (layers * layer + head) / (p * layer), np.ceil(layers / others)
    best = equal
    for k in (np.floor(crossing), np.ceil(crossing)):
        each = np.clip(k, 1, most)
        last = np.maximum(layers - each * others, 0)
        best = np.minimum(best, np.maximum(each * layer, last * layer + head))
    slowest = np.where(even > 0, equal, best)
    return np.where(p > 1, slowest, layers * layer + head)
