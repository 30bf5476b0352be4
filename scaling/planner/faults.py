"""Detection of measured runs slowed by a fault, by comparison with similar runs."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.communication import held
from allometry.scaling.planner.constants import Floats

SLOW = 1.5  # threshold of slowness
EXCHANGED = 8  # bytes per parameter at a quarter of the slower link: more than any working run
ALIKE = (
    *("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "experts", "top_k"),
    *("tp", "cp", "ep", "sequence", "sequence_parallel", "flash"),
)


def slowness(cases: Cases, seconds: Floats, sources: Floats) -> Floats:
    """Return the ratio of a run's time to the upper bound given by other runs of its source, (C,).

    No cost model or constant is used. A run of the same model with the same tp, cp, ep, sequence,
    precision and recompute and at least this micro-batch spent at most step * pp / ((m +
    (pp-1)/chunks) * layers) on a layer and micro-batch, and the layers of this run take no longer.
    For the exchange of gradients ``EXCHANGED`` is added. A ratio above ``SLOW`` shows a cause
    outside the layout: a stalled pipeline, a failing link.
    """
    n, m = cases.n, cases.micro_batches
    ticks = (m + (n["pp"] - 1) / n["chunks"]) * np.ceil(n["layers"] / n["pp"])
    slower_link = np.minimum(cases.hw["across"], cases.hw["inside"])
    allowed = EXCHANGED * sum(held(cases)) / (0.25 * slower_link) * (n["dp"] * n["cp"] > 1)
    names = zip(sources, cases.hardware, cases.precision, cases.recompute, strict=True)
    numbers = np.stack([n[key] for key in ALIKE], axis=1)
    keys = ["|".join(map(str, (*name, *row))) for name, row in zip(names, numbers, strict=True)]
    per_layer, possible = seconds / ticks, np.empty(len(cases))
    for key in set(keys):
        alike = np.flatnonzero(np.array(keys) == key)
        order = alike[np.argsort(-n["micro_batch"][alike], kind="stable")]
        least = np.minimum.accumulate(per_layer[order])
        # Runs with equal micro-batches are compared with the fastest one.
        last = np.searchsorted(-n["micro_batch"][order], -n["micro_batch"][order], "right") - 1
        possible[order] = least[last]
    return np.asarray(seconds / (possible * ticks + allowed))
