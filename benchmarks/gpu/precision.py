"""Compare FP8 with bf16 on one GPU: speed, MFU relative to the bf16 peak, peak memory.

    python benchmarks/gpu/precision.py [--seconds 470] [--only PART]... [--out FILE] [--check]

Parts are runs of ``python -m allometry.launch.train``, with the options and method of
``throughput.py``: bf16, FP8 saved activations, and each recipe of FP8 products with them, at the
micro-batch of bf16; parts marked "largest" use the largest micro-batch that fits.
``benchmarks/precision_products.py`` measures the loss at equal tokens, on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shapes import REHEARSED, SHAPES
from throughput import Part, Ratio, main

SAVED = {"saved_activations": "fp8"}
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "saved": SAVED,
    "fp8_rowwise, saved": {"linears": "fp8_rowwise", **SAVED},
    "fp8_tensorwise, saved": {"linears": "fp8_tensorwise", **SAVED},
    "fp8_blockwise, saved": {"linears": "fp8_blockwise", **SAVED},
}
SIZES = {
    "1b": (8, (32, 16, 8, 4)),
    "7b-cut": (2, (16, 8, 4, 2)),
    "moe": (4, (16, 8, 4, 2)),
}
"""Micro-batch of all precisions, and the candidates for the largest micro-batch."""


FIRST = [
    f"{size}, {name}"
    for name in ("fp8_rowwise, saved", "saved", "fp8_tensorwise, saved")
    for size in SIZES
]
FIRST = [f"{size}, bf16" for size in SIZES] + FIRST
"""Parts to run first, in about eight minutes; the remaining time goes to the others, in order."""


def _parts() -> tuple[Part, ...]:
    found = []
    for precisions, largest in ((tuple(PRECISIONS)[:4], False), (("bf16", "saved"), True)):
        for name in precisions:
            for size in SIZES:
                shape = f"{size}, largest" if largest else size
                found.append(
                    Part(f"{shape}, {name}", shape, 55, overrides={"precision": PRECISIONS[name]})
                )
    blockwise = {"precision": PRECISIONS["fp8_blockwise, saved"]}
    found.append(Part("1b, fp8_blockwise, saved", "1b", 55, overrides=blockwise))
    names = [part.name for part in found]
    return tuple(sorted(found, key=lambda part: (FIRST + names).index(part.name)))


PARTS = _parts()
RATIOS = (
    Ratio("1b, fp8_rowwise, saved", "1b, bf16", 1.3),
    Ratio("1b, fp8_tensorwise, saved", "1b, bf16", 1.3),
    Ratio("7b-cut, fp8_rowwise, saved", "7b-cut, bf16", 1.43),
    Ratio("7b-cut, fp8_tensorwise, saved", "7b-cut, bf16", 1.43),
    Ratio("1b, saved", "1b, bf16", None),
    Ratio("moe, fp8_rowwise, saved", "moe, bf16", None),
    Ratio("1b, largest, saved", "1b, largest, bf16", None, less_memory=False),
    Ratio("7b-cut, largest, saved", "7b-cut, largest, bf16", None, less_memory=False),
)


def _sized(shapes: dict[str, Any], *, check: bool) -> dict[str, Any]:
    found = {}
    for size, (equal, largest) in SIZES.items():
        shape = shapes[size]
        found[size] = replace(shape, micro_batches=(4,) if check else (equal,))
        tried = shape.micro_batches if check else largest
        found[f"{size}, largest"] = replace(shape, micro_batches=tried)
    return found


if __name__ == "__main__":
    main(
        "precision",
        PARTS,
        RATIOS,
        _sized(SHAPES, check=False),
        _sized(REHEARSED, check=True),
    )
