"""Table of runs with a user's own column names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

MAPPED = ("--map", "N=size", "--map", "D=tokens", "--map", "loss=nll")


def noisy_table(path: Path) -> Path:
    """Write rows of Chinchilla's law with noise; return ``path``."""
    rng = np.random.default_rng(0)
    lines = ["size,tokens,nll,set"]
    for size in (1e7, 3e7, 1e8, 3e8, 1e9):
        for ratio in (5, 20, 80):
            loss = 1.8 + 480 / size**0.35 + 2000 / (ratio * size) ** 0.37
            noisy = loss * (1 + 0.002 * rng.standard_normal())
            lines.append(f"{size},{ratio * size},{noisy},{'a' if ratio < 50 else 'b'}")
    path.write_text("\n".join(lines))
    return path
