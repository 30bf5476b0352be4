"""Check a device's reproducibility: compute gradients twice, and products with known sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from typing_extensions import override

from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh, local
from allometry.trainer.record.bits import checksum
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.corruption import Response, names_of

NAMED = 5
INNER = 256
"""Terms of each sum in a product, all ±1, so that every type, also bf16, is exact."""
ROWS = {"cuda": 4096}
ROWS_OF_CPU = 256


class ComputedTwice(Callback):
    """Computes the gradients of some steps twice before they are taken.

    ``compute`` runs forward and backward of the next step and returns the checksum of this rank's
    losses. Buffers (router statistics) and random generators are restored; the step itself clears
    the gradients. A fault of one rank in a backward pass reaches all ranks with the reduced
    gradients; a fault in a forward pass is located by that rank's losses.
    """

    def __init__(
        self,
        every_steps: int,
        parallel: Parallel,
        compute: Callable[[], Tensor],
        mesh: Mesh,
        response: Response,
    ) -> None:
        self._every, self._parallel, self._compute = every_steps, parallel, compute
        self._mesh, self._response = mesh, response

    @override
    def before_step(self, step: int) -> None:
        if step % self._every:
            return
        first, second = (self._once() for _ in range(2))
        names = sorted(first)
        pairs = torch.stack([torch.stack([one[n] for n in names]) for one in (first, second)])
        differ = [n for n, (a, b) in zip(names, pairs.T.tolist(), strict=True) if a != b]
        every = self._mesh.gather_objects(differ)
        if not any(every):
            return
        lost = [rank for rank, found in enumerate(every) if LOSSES in found]
        ranks = lost or [rank for rank, found in enumerate(every) if found]
        tensors = sorted({name for found in every for name in found if name != LOSSES})
        what = "losses" if lost else f"gradients of {', '.join(tensors[:NAMED])}"
        said = f"{names_of(ranks)} computed other {what} the second time"
        self._response.found(
            "computed_twice_differs", step, said, ranks=ranks, tensors=tensors[:NAMED]
        )

    def _once(self) -> dict[str, Tensor]:
        with _put_back(self._parallel, self._mesh.device):
            sums = {LOSSES: self._compute()}
            for name, parameter in self._parallel.named_parameters():
                if parameter.grad is not None:
                    sums[name] = checksum(local(parameter.grad))
        return {name: one.to(self._mesh.device) for name, one in sums.items()}


LOSSES = ""
"""Key of the checksum of this rank's losses, different from any tensor's name."""


@contextmanager
def _put_back(parallel: Parallel, device: torch.device) -> Iterator[None]:
    buffers = [buffer for part in parallel.parts.values() for buffer in part.buffers()]
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


class ProductTest(Callback):
    """Tests matrix products before the first step of a launch, on every rank."""

    def __init__(self, dtype: torch.dtype, mesh: Mesh, response: Response) -> None:
        self._dtype, self._mesh, self._response = dtype, mesh, response
        self._done = False

    @override
    def before_step(self, step: int) -> None:
        if self._done:
            return
        self._done = True
        wrong = products_wrong(self._mesh.device, self._dtype)
        ranks = [rank for rank, count in enumerate(self._mesh.gather_objects(wrong)) if count]
        if ranks:
            said = f"{names_of(ranks)} computed a wrong matrix product ({self._dtype})"
            self._response.found("self_test_failed", step, said, ranks=ranks)


@torch.no_grad()
def products_wrong(device: torch.device, dtype: torch.dtype) -> int:
    """Multiply matrices of ±1; return the number of rows and columns with a wrong sum.

    Row sums of A·B are compared with A·(B·1), computed in integers without a matrix product, and
    column sums with (1ᵀ·A)·B; a wrong element changes one row sum and one column sum.
    """
    size = ROWS.get(device.type, ROWS_OF_CPU)
    own = torch.Generator(device).manual_seed(1)
    left, right = (
        2 * torch.randint(0, 2, shape, device=device, generator=own) - 1
        for shape in ((size, INNER), (INNER, size))
    )
    product = torch.mm(left.to(dtype), right.to(dtype)).double()  # exact: at most 2^24 in total
    rows = (left * right.sum(1)).sum(1)
    columns = (left.sum(0)[:, None] * right).sum(0)
    return int((product.sum(1) != rows).sum() + (product.sum(0) != columns).sum())
