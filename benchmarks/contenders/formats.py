"""FP8 formats of optimizer states on numbers drawn at random: E4M3 expanded, and plain."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from allometry.optim import dre
from allometry.optim.dre import Dither, Encoded, Table

CPU = torch.device("cpu")
SPREADS = (0.0, 0.3, 0.7)
"""Standard deviation of the log of the gradients' size from column to column."""
ROWS, COLUMNS = 256, 1024


def plain(table: Table) -> Table:
    """The same codes and groups of 128 without expansion: every exponent is 1."""
    ranges = torch.full_like(table.ranges, math.inf)
    ranges[: 255 - dre.STEPS] = -1.0
    return table._replace(ranges=ranges, kept_ranges=torch.full_like(table.kept_ranges, -1.0))


def rounded(x: Tensor, table: Table) -> Tensor:
    to = Encoded.zeros(tuple(x.shape), x.device)
    dre.encode(x.contiguous(), to, table)
    return dre.decode(to, table)


def error(x: Tensor, to: Tensor) -> float:
    """Root of squared errors over squared values."""
    return float((x - to).double().norm() / to.double().norm())


def moments(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Adam's after 60 steps, beta 0.9 and 0.95."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(COLUMNS, generator=generator)) * 1e-3
    m, v = torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS)
    for _ in range(60):
        g = torch.randn(ROWS, COLUMNS, generator=generator) * size
        m.lerp_(g, 0.1)
        v.mul_(0.95).addcmul_(g, g, value=0.05)
    return m, v


def once(spread: float) -> dict[str, Any]:
    """One rounding of both moments."""
    m, v = moments(spread)
    exact, found = m / v.sqrt(), {"spread": spread}
    own = Table.on(CPU)
    for name, table in (("expanded", own), ("plain", plain(own))):
        kept_m, kept_v = rounded(m, table), rounded(v, table)
        found[f"{name} m"] = error(kept_m, m)
        found[f"{name} v"] = float(((kept_v - v).abs() / v).mean())
        found[f"{name} update"] = float((kept_m / kept_v.sqrt() - exact).square().mean())
    zeros = m.clone()
    zeros[:, ::3] = 0.0
    found["expanded m with zeros"] = error(rounded(zeros, own), zeros)
    return found


def averaged(beta: float, steps: int) -> dict[str, Any]:
    """An average of squares that is rounded after each step; gradients halve at half time.

    Root mean square of its relative error, by format; ``fresh``: with a new exponent at each step.
    """
    generator = torch.Generator().manual_seed(0)
    own, rows = Table.on(CPU), torch.arange(32)
    size = torch.exp(0.3 * torch.randn(512, generator=generator)) * 1e-3
    exact = torch.zeros(32, 512)
    kept = {n: Encoded.zeros((32, 512), CPU) for n in ("expanded", "at random", "fresh", "plain")}
    for step in range(steps):
        square = (torch.randn(32, 512, generator=generator) * size).square()
        square *= 0.25 if step >= steps // 2 else 1.0
        exact = beta * exact + (1.0 - beta) * square
        for name, to in kept.items():
            table = plain(own) if name == "plain" else own
            now = beta * dre.decode(to, table) + (1.0 - beta) * square
            if name == "fresh":
                to.exponent.zero_()
            dither = Dither((step, 3), rows, 0) if name == "at random" else None
            dre.encode(now, to, table, dither)
    found: dict[str, Any] = {"beta": beta, "steps": steps}
    for name, to in kept.items():
        value = dre.decode(to, plain(own) if name == "plain" else own)
        found[name] = float((value / exact - 1.0).square().mean().sqrt())
    return found
