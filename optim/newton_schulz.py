"""Orthogonalize matrices with matrix products only."""

# B matrices of a batch, R and C their rows and columns

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Which = TypeVar("Which")

Coefficients = tuple[float, float, float]
"""Coefficients (a, b, c) of one iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X."""

MUON: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients with the largest slope at 0; singular values converge to about [0.7, 1.2] (K.
Jordan, 2024).
"""

DION: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Coefficients that vary by iteration; singular values above 0.01 or so end in [0.97, 1.04]."""


def newton_schulz(
    matrix: Tensor,
    coefficients: Sequence[Coefficients],
    *,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return approximately UVᵀ of matrix = USVᵀ, [out, in], computed and returned in ``dtype``.

    Source: https://kellerjordan.github.io/posts/muon/. With ``MUON`` and products in ``dtype`` the
    result is bit-identical to torch.optim.Muon, with the same order of operations. If ``in_fp32``,
    each product of half-precision matrices is computed in fp32 and rounded: only the order of its
    sums differs. The matrix is divided by its Frobenius norm, or by ``eps`` if that is larger:
    zeros stay zeros. For example, ``newton_schulz(gradient, MUON)``.
    """
    assert matrix.dim() == 2, matrix.shape
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    if tall:  # the Gram matrix then has the smaller dimension
        x = x.T
    x = x / x.norm().clamp(min=eps)
    wide = in_fp32(x.device.type, dtype)
    if wide:
        x = x.float()

    def rounded(product: Tensor) -> Tensor:
        return product.to(dtype).float() if wide else product

    for a, b, c in coefficients:
        gram = rounded(x @ x.T)
        polynomial = rounded(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        x = rounded(torch.addmm(x, polynomial, x, beta=a))
    x = x.to(dtype)
    return x.T if tall else x


def in_fp32(device_type: str, dtype: torch.dtype) -> bool:
    """Return True if products of matrices of ``dtype`` are computed in fp32 and rounded.

    True for half precision on a CPU: without bf16 units a bf16 product of 256 x 256 matrices takes
    more than 30 times as long as an fp32 product.
    """
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def orthogonal(
    matrices: Iterable[tuple[Which, Tensor]],
    coefficients: Sequence[Coefficients],
    batch_of: Callable[[int, int, str], int] | None = None,
) -> Iterator[tuple[Which, Tensor]]:
    """Yield ``newton_schulz`` of each matrix, in its type, with its id; in any order.

    Matrices of one shape are computed in batches of ``batch_of(rows, columns, device type)`` (None:
    ``usual_batch``), and the last batch is padded with zeros. Batched products round differently
    for different batch sizes, so the size must not depend on the number of matrices on this rank.
    """
    waiting: dict[tuple[int, ...], list[tuple[Which, Tensor]]] = {}
    for which, matrix in matrices:
        rows, columns = matrix.shape
        batch = (batch_of or usual_batch)(rows, columns, matrix.device.type)
        if batch == 0:
            yield which, newton_schulz(matrix, coefficients, dtype=matrix.dtype)
            continue
        members = waiting.setdefault((batch, *matrix.shape), [])
        members.append((which, matrix))
        if len(members) == batch:
            yield from _batch(members, batch, coefficients)
            members.clear()
    for (batch, *_), members in waiting.items():
        if members:
            yield from _batch(members, batch, coefficients)


def usual_batch(rows: int, columns: int, device_type: str) -> int:
    """Return the batch size for matrices of one shape; 0: single matrices, without a batch.

    On a GPU the batch fills one wave of thread blocks with its smallest product, so a partly filled
    batch costs as much as one matrix. On a CPU batching saves no time. The result depends only on
    shape and device type. For example, 1024 x 4096 on a GPU gives 2.
    """
    if device_type == "cpu":
        return 0
    tiles = -(-min(rows, columns) // _TILE)
    return min(1 << (max(1, _BLOCKS // (tiles * (tiles + 1) // 2)).bit_length() - 1), 64)


_TILE, _BLOCKS = 128, 132  # of a product, and of a wave: an H100 and H200 have 132 multiprocessors


def _batch(
    members: Sequence[tuple[Which, Tensor]], batch: int, coefficients: Sequence[Coefficients]
) -> Iterator[tuple[Which, Tensor]]:
    first = members[0][1]
    stack_BRC = first.new_zeros(batch, *first.shape)
    torch._foreach_copy_(list(stack_BRC[: len(members)].unbind()), [each for _, each in members])
    results = newton_schulz_batch(stack_BRC, coefficients).unbind()
    yield from ((which, result) for (which, _), result in zip(members, results, strict=False))


def newton_schulz_batch(
    stack_BRC: Tensor, coefficients: Sequence[Coefficients], *, eps: float = 1e-7
) -> Tensor:
    """Return ``newton_schulz`` of each matrix of a stack, in its type.

    The first two products of an iteration are symmetric: if ``_symmetric`` has a kernel, only half
    of each product is computed, and then mirrored. A CPU computes single matrices
    (``usual_batch``).
    """
    tall = stack_BRC.shape[1] > stack_BRC.shape[2]
    x = stack_BRC.mT.contiguous() if tall else stack_BRC
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = _symmetric(x)
        x = torch.baddbmm(x, _symmetric(gram, gram, b, c), x, beta=a)
    return x.mT if tall else x


def _symmetric(
    x_BRC: Tensor, add_BRR: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return beta * ``add`` + alpha * x xᵀ, [B, R, R]; ``add`` is symmetric."""
    half = x_BRC.dtype in (torch.bfloat16, torch.float16)
    there = x_BRC.is_cuda and half and not isinstance(x_BRC, FakeTensor)
    if there and find_spec("triton") is not None:
        from allometry.optim.symmetric_cuda import symmetric_product

        return symmetric_product(x_BRC, add_BRR, beta, alpha)
    if add_BRR is None:
        return torch.bmm(x_BRC, x_BRC.mT)
    return torch.baddbmm(add_BRR, x_BRC, x_BRC.mT, beta=beta, alpha=alpha)


def newton_schulz_cost(rows: int, columns: int) -> float:
    """Return multiply-adds of one iteration for a matrix [rows, columns].

    For example, a matrix [2, 3] needs 32.
    """
    least, most = sorted((rows, columns))
    return float(least * least * (2 * most + least))
