"""Seconds of what waits in the host's memory or on its disk: optimizer states and activations."""

from __future__ import annotations

import numpy as np

from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.communication import updated
from allometry.scaling.planner.constants import Floats
from allometry.scaling.planner.operators import rank_tokens

FORWARD = 1 / 3  # of a layer's computation
MASTER = 4  # bytes of a parameter that the host updates, there and back


def states(cases: Cases) -> Floats:
    """Seconds of a step's states on their way and of an update on CPUs; 0 with all on the device.

    Buckets go both ways at once over a rank's link to the host; what is on disk is read and
    written besides, by all of a node's ranks from one disk. An update on the host moves gradients
    there and parameters back, at the node's rate of AdamW (``Host.adam_rate``).
    """
    n, hw = cases.n, cases.hw
    own, ranks = updated(cases), np.minimum(cases.gpus, hw["gpus_per_node"])
    away = own * n["state_bytes"] * (n["states_host"] + n["states_disk"])
    link = np.where(n["host_update"] > 0, own * MASTER, away) / hw["host"]
    disk = 2 * own * n["state_bytes"] * n["states_disk"] * ranks / hw["disk"]
    computed = np.where(n["host_update"] > 0, own / hw["adam"], 0.0)
    return np.asarray(np.maximum(link, disk) + computed)


def activations(cases: Cases, layer: Floats) -> Floats:
    """Seconds of a mean layer's kept activations on their way that computing does not hide.

    ``layer``: seconds of its forward and backward. Layers that offload send while one layer
    computes forward and fetch while one does backward (``scaling.offload``).
    """
    n = cases.n
    each = rank_tokens(cases) * n["kept_bytes"] / cases.hw["host"]
    there = np.maximum(each - FORWARD * layer, 0.0)
    back = np.maximum(each - (1 - FORWARD) * layer, 0.0)
    return np.asarray(n["activations_host"] * (there + back))
