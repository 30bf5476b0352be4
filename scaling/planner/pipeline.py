"""Pipeline losses: bubbles of schedules."""

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
    """Return idle seconds per step of a rank, for a pipeline of equal stages.

    The times are for one micro-batch on a rank with all its ``chunks``: F, B (activation gradients)
    and W (weight gradients). Schedules of runs, as replayed (``parallel.hdp.replay``): gpipe and
    1f1b (arXiv 2006.09503) lose (p-1)(F+B+W); interleaved_1f1b (arXiv 2104.04473) and looped_bfs
    lose this over the chunks; interleaved_zero_bubble (p-1) max(F+B-W, B) over the chunks;
    zbv_zero_bubble (p-1) max(F, B, W) over its 2 chunks, exact if B is the longest and there are 2p
    micro-batches; dualpipe_v (p-1)(F+B-W) over its 2 chunks, exact if B is no longer than F, else
    up to half more. Published: interleaved as above, zb_h1 (p-1)(F+B-W), zb_h2 (p-1)(F+B-2W) (arXiv
    2401.10241, table 2), zbv 0 for F=B=W, else (p-1)(longest - shortest)/2. For example, 1f1b on 4
    stages with F = 1, B = W = 1 loses 9.
    """
    schedule = np.asarray(schedule)
    assert np.isin(schedule, SCHEDULES).all(), schedule
    p1 = np.asarray(stages, dtype=float) - 1
    f, b, w = (np.asarray(x, dtype=float) for x in (forward, backward_input, backward_weight))
    longest, whole, chunks = np.maximum(np.maximum(f, b), w), f + b + w, np.asarray(chunks)
    each = {
        **dict.fromkeys(("gpipe", "1f1b"), whole),
        **dict.fromkeys(("interleaved_1f1b", "looped_bfs", "interleaved"), whole / chunks),
        "interleaved_zero_bubble": np.maximum(f + b - w, b) / chunks,
        "zbv_zero_bubble": longest / 2,
        "dualpipe_v": np.maximum(f + b - w, 0.0) / 2,
        "zb_h1": f + b - w,
        "zb_h2": f + b - 2 * w,
        "zbv": (longest - np.minimum(np.minimum(f, b), w)) / 2,
    }
    lost = np.select([schedule == name for name in each], list(each.values()))
    return np.asarray(p1 * np.maximum(lost, 0.0))


def bottleneck(layer: Floats, layers: Floats, head: Floats, p: Floats, even: Floats) -> Floats:
    """Return seconds of the slowest stage; ``head``: extra time of the last stage.

    ``even``: every stage has the same number of layers; otherwise the last stage has the number of
    layers that minimizes the slowest stage, and the others share the rest.
    """
    equal = np.maximum(np.ceil(layers / p) * layer, layers / p * layer + head)
    # K layers per other stage: their time increases with K, and the last stage gets fewer layers.
    others = np.maximum(p - 1, 1)
    crossing, most = (layers * layer + head) / (p * layer), np.ceil(layers / others)
    best = equal
    for k in (np.floor(crossing), np.ceil(crossing)):
        each = np.clip(k, 1, most)
        last = np.maximum(layers - each * others, 0)
        best = np.minimum(best, np.maximum(each * layer, last * layer + head))
    slowest = np.where(even > 0, equal, best)
    return np.where(p > 1, slowest, layers * layer + head)
