"""Measure speed and peak memory with states, fp32 parameters and gradients off one GPU.

    python benchmarks/gpu/offload.py [--seconds 470] [--only PART]... [--out FILE] [--check]

Parts are runs of ``python -m allometry.launch.train``, with the options and method of
``throughput.py``: all tensors on the GPU; 25 and 100 per cent of states, fp32 parameters and
gradients in host memory; and all of them on NVMe. The NVMe folder is the value of the variable
ALLOMETRY_NVME, by default ``nvme-scratch`` in the current folder; choose a local disk. The goals
are the reported costs of Megatron's optimizer offload: 1.9 times the step time at 25 per cent, 4.2
times at 100.
"""

from __future__ import annotations

import os
from typing import Any

from shapes import REHEARSED, SHAPES
from throughput import Part, Ratio, main

NVME = os.path.abspath(os.environ.get("ALLOMETRY_NVME", "nvme-scratch"))
AWAY: dict[str, Any] = {"master_weights": True, "gradients": True}
PLACES: dict[str, dict[str, Any] | None] = {
    "on the GPU": None,
    "25% on the host": {**AWAY, "device": 0.75},
    "states on the host": {},
    "all on the host": AWAY,
    "all on NVMe": {**AWAY, "nvme": NVME},
}
SIZES = ("1b", "7b-cut")
PARTS = tuple(
    Part(
        f"{size}, {place}",
        size,
        70,
        overrides={"parallel": {"zero": {"stage": 3, "optimizer_states": states}}},
    )
    for size in SIZES
    for place, states in PLACES.items()
)
RATIOS = tuple(
    Ratio(f"{size}, {place}", f"{size}, on the GPU", goal)
    for size in SIZES
    for place, goal in (
        ("25% on the host", 1 / 1.9),
        ("states on the host", None),
        ("all on the host", 1 / 4.2),
        ("all on NVMe", None),
    )
)

if __name__ == "__main__":
    main("offload", PARTS, RATIOS, SHAPES, REHEARSED)
