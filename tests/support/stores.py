"""Token stores in which every token identifies its source, document and position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from allometry.data.synthetic import write_store


def write_two_sources(folder: Path) -> Path:
    """Write ``code`` and ``prose`` with consecutive tokens per source; some documents are empty."""
    rng = np.random.default_rng(0)
    for name, first, lengths in (
        ("code", 1, rng.integers(0, 23, 40)),
        ("prose", 30000, rng.integers(1, 5, 25)),
    ):
        ends = np.cumsum(lengths)
        documents = [
            np.arange(first + end - n, first + end) for n, end in zip(lengths, ends, strict=True)
        ]
        write_store(folder / name, documents)
    return folder


def sources(folder: Path, **weights: float) -> list[dict[str, Any]]:
    """Return the config sources; if the store ``held`` exists, it is the held-out data of each."""
    held = {"validation": str(folder / "held")} if (folder / "held.bin").exists() else {}
    return [
        {"name": name, "train": str(folder / name), "weight": weight} | held
        for name, weight in weights.items()
    ]
