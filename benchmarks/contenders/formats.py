"""Errors of 8-bit formats of optimizer states on random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allometry.optim import dre
from allometry.optim.dre import Dither, Encoded, Table
from contenders import torchao_states

CPU = torch.device("cpu")
SPREADS = (0.0, 0.3, 0.5, 0.7, 1.0)
"""Standard deviation, over columns, of the log of the gradients' size."""
ROWS, COLUMNS = 128, 1024


def plain(table: Table) -> Table:
    """Return the table with the same codes and groups of 128, without expansion: exponent 1."""
    ranges = torch.full_like(table.ranges, math.inf)
    ranges[: 255 - dre.STEPS] = -1.0
    return table._replace(ranges=ranges, kept_ranges=torch.full_like(table.kept_ranges, -1.0))


def rounded(x: Tensor, table: Table) -> Tensor:
    to = Encoded.zeros(tuple(x.shape), x.device)
    dre.encode(x.contiguous(), to, table)
    return dre.decode(to, table)


def error(x: Tensor, to: Tensor) -> float:
    """Return the relative error: norm of the difference over the norm of ``to``."""
    return float((x - to).double().norm() / to.double().norm())


def moments(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return Adam's moments after 60 steps, with beta 0.9 and 0.95."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(spread * torch.randn(COLUMNS, generator=generator)) * 1e-3
    m, v = torch.zeros(ROWS, COLUMNS), torch.zeros(ROWS, COLUMNS)
    for _ in range(60):
        g = torch.randn(ROWS, COLUMNS, generator=generator) * size
        m.lerp_(g, 0.1)
        v.mul_(0.95).addcmul_(g, g, value=0.05)
    return m, v


def drawn(spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random moments without a history.

    v is log-normal for each element; m is normal, with the variance that Adam's m has for gradients
    of mean zero (beta 0.9).
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.exp(spread * torch.randn(ROWS, COLUMNS, generator=generator)) * 1e-6
    m = torch.randn(ROWS, COLUMNS, generator=generator) * (v * (0.1 / 1.9)).sqrt()
    return m, v


CASES: dict[str, tuple[Callable[[float, int], tuple[Tensor, Tensor]], float]] = {
    "v log-normal, 1.0": (drawn, 1.0),
    **{f"columns, {spread}": (moments, spread) for spread in SPREADS},
}
"""Drawing function and log-spread of v's elements, or of the columns' gradients, by case."""


def formats() -> dict[str, Callable[[Tensor, bool], Tensor]]:
    """Return functions (tensor, signed) -> rounded tensor, by format name."""
    own = Table.on(CPU)
    flat = plain(own)
    return {
        "expanded": lambda x, signed: rounded(x, own),
        "plain": lambda x, signed: rounded(x, flat),
        **torchao_states.formats(),
    }


def error_of_update(
    m: Tensor, v: Tensor, to: Callable[[Tensor, bool], Tensor], eps: float = 1e-8
) -> float:
    """Return the mean squared error of m / (sqrt(v) + eps) with both rounded, where v > 0."""
    seen = v > 0.0
    exact = m[seen] / (v[seen].double().sqrt() + eps)
    kept_m, kept_v = to(m, True)[seen], to(v, False)[seen]
    return float((kept_m / (kept_v.double().sqrt() + eps) - exact).square().mean())


def once(case: str, seed: int = 0) -> dict[str, Any]:
    """Round both moments once; return errors by "FORMAT m", "FORMAT v" and "FORMAT update"."""
    draw, spread = CASES[case]
    m, v = draw(spread, seed)
    found: dict[str, Any] = {"case": case}
    for name, to in formats().items():
        found[f"{name} m"] = error(to(m, True), m)
        found[f"{name} v"] = float(((to(v, False) - v).abs() / v).mean())
        found[f"{name} update"] = error_of_update(m, v, to)
    zeros = m.clone()
    zeros[:, ::3] = 0.0
    found["expanded m with zeros"] = error(rounded(zeros, Table.on(CPU)), zeros)
    return found


def averaged(beta: float, steps: int) -> dict[str, Any]:
    """Round an average of squares after each step; gradients halve halfway through.

    Returns the root mean square of its relative error by format. ``fresh``: a new exponent at each
    step.
    """
    generator = torch.Generator().manual_seed(0)
    own, rows = Table.on(CPU), torch.arange(32)
    size = torch.exp(0.3 * torch.randn(512, generator=generator)) * 1e-3
    exact = torch.zeros(32, 512)
    kept = {n: Encoded.zeros((32, 512), CPU) for n in ("expanded", "at random", "fresh", "plain")}
    others = torchao_states.formats()
    values = {name: torch.zeros(32, 512) for name in others}
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
        for name, round_to in others.items():
            values[name] = round_to(beta * values[name] + (1.0 - beta) * square, False)
    found: dict[str, Any] = {"beta": beta, "steps": steps}
    for name, to in kept.items():
        values[name] = dre.decode(to, plain(own) if name == "plain" else own)
    for name, value in values.items():
        found[name] = float((value / exact - 1.0).square().mean().sqrt())
    return found
