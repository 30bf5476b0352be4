"""Compare the grouped product with loops over groups: ``python -m contenders.grouped --out FILE``.

Measures forward and backward (gradients of rows and of weights) of ``grouped_linear``, of its
reference ``loop_linear`` and of a careful user's loop, at equal work: the same rows, divided among
more or fewer experts. The products alternate, call by call.
"""

# S rows, E experts, D input width, F output width

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from allometry.models.grouped import grouped_linear, loop_linear

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def unbound_loop(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Loop over ``unbind``, whose backward stacks the gradients of all groups once.

    The gradient of ``weight[e]`` would have the size of all of ``weight``, for each group.
    """
    pairs = zip(x_SD.split(counts_E.tolist()), weight_EFD.unbind(), strict=True)
    return torch.cat([x @ weight_FD.T for x, weight_FD in pairs])


PRODUCTS: dict[str, Product] = {
    "grouped": grouped_linear,
    "loop_linear": loop_linear,
    "unbound loop": unbound_loop,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Largest difference of a result or gradient relative to its largest element, from rounding.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}
BUDGET_S = 2.0
"""Time after which a case takes no further measurement; each product is measured at least once."""


@dataclass(frozen=True)
class Size:
    """Shapes: ``rows`` [S, D] times expert weights [F, D], for any number of experts."""

    rows: int
    width: int
    out_width: int
    experts: tuple[int, ...]

    @property
    def flops(self) -> int:
        return 3 * 2 * self.rows * self.width * self.out_width


SIZES = {
    "layouts": Size(rows=8192, width=256, out_width=128, experts=(8, 64, 256)),
    "tiny": Size(rows=256, width=64, out_width=64, experts=(4, 16)),
}


@dataclass(frozen=True)
class Case:
    """Row of the table. ``load``: distribution of the rows over the experts."""

    experts: int
    load: str
    dtype: str
    threads: int

    def counts(self, rows: int) -> Tensor:
        """Return the rows of each expert [E]: even, or proportional to 1/rank, largest first."""
        ranks_E = torch.arange(1, self.experts + 1, dtype=torch.float64)
        share_E = torch.ones_like(ranks_E) if self.load == "even" else 1.0 / ranks_E
        exact_E = share_E / share_E.sum() * rows
        counts_E = exact_E.floor().long()
        left = rows - int(counts_E.sum())
        counts_E[(exact_E - counts_E).argsort(descending=True, stable=True)[:left]] += 1
        return counts_E


def cases(size: Size) -> Iterator[Case]:
    for threads in (1, 2):
        for dtype in DTYPES:
            for experts in size.experts:
                for load in ("even", "skewed"):
                    yield Case(experts, load, dtype, threads)


def measure(case: Case, size: Size, repeats: int, names: list[str]) -> dict[str, list[float]]:
    """Return the seconds of each call by product; ``names`` is the order of the products."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    dtype = DTYPES[case.dtype]
    x_SD = torch.randn(size.rows, size.width).to(dtype).requires_grad_()
    weight_EFD = torch.randn(case.experts, size.out_width, size.width) / size.width**0.5
    weight_EFD = weight_EFD.to(dtype).requires_grad_()
    grad_SF = torch.randn(size.rows, size.out_width).to(dtype)
    counts_E = case.counts(size.rows)

    def call(name: str) -> tuple[Tensor, ...]:
        y_SF = PRODUCTS[name](x_SD, weight_EFD, counts_E)
        return (y_SF.detach(), *torch.autograd.grad(y_SF, (x_SD, weight_EFD), grad_SF))

    results = {name: call(name) for name in names}  # serves as the warm-up
    for name in names:
        for made, twin in zip(results[name], results["loop_linear"], strict=True):
            error = float((made - twin).abs().max() / twin.abs().max())
            assert error <= TOLERANCE[case.dtype], (case, name, error)
    del results
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begun = time.perf_counter()
    while len(seconds[names[-1]]) < repeats and time.perf_counter() - begun < BUDGET_S:
        for name in names:
            start = time.perf_counter()
            call(name)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="layouts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--reverse", action="store_true", help="the products in other order")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    size = SIZES[given.size]
    names = list(PRODUCTS)[:: -1 if given.reverse else 1]
    rows = []
    for case in cases(size):
        seconds = measure(case, size, given.repeats, names)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rows.append({**asdict(case), "median_s": medians, "seconds": seconds})
    result = {"size": {**asdict(size), "flops": size.flops}, "cases": rows}
    given.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
