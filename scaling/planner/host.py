"""Seconds of transfers of optimizer states and activations offloaded to host memory or disk."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.communication import updated
from allometry.scaling.planner.constants import Floats
from allometry.scaling.planner.operators import rank_tokens

FORWARD = 1 / 3  # of a layer's computation
MASTER = 4  # bytes of a parameter that the host updates, in each direction


def states(cases: Cases) -> Floats:
    """Return seconds per step of state transfers and CPU updates; 0 for states on the device.

    Buckets are transferred in both directions at once over a rank's host link. States on disk are
    also read and written, by all ranks of a node from one disk. An update on the host transfers
    gradients to it and parameters back, and runs at the node's AdamW rate (``Host.adam_rate``).
    """
    n, hw = cases.n, cases.hw
    own, ranks = updated(cases), np.minimum(cases.gpus, hw["gpus_per_node"])
    away = own * n["state_bytes"] * (n["states_host"] + n["states_disk"])
    link = np.where(n["host_update"] > 0, own * MASTER, away) / hw["host"]
    disk = 2 * own * n["state_bytes"] * n["states_disk"] * ranks / hw["disk"]
    computed = np.where(n["host_update"] > 0, own / hw["adam"], 0.0)
    return np.asarray(np.maximum(link, disk) + computed)


def activations(cases: Cases, layer: Floats) -> Floats:
    """Return exposed seconds of a mean layer's activation offload.

    ``layer``: seconds of its forward and backward. Offloaded layers are sent during the forward of
    one layer and fetched during the backward of one layer (``scaling.offload``).
    """
    n = cases.n
    each = rank_tokens(cases) * n["kept_bytes"] / cases.hw["host"]
    there = np.maximum(each - FORWARD * layer, 0.0)
    back = np.maximum(each - (1 - FORWARD) * layer, 0.0)
    return np.asarray(n["activations_host"] * (there + back))
