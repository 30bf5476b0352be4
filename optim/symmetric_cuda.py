"""Triton kernel for products of a matrix with its transpose, which computes only one half."""

# B matrices of a batch, R and C their rows and columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE, _DEPTH = 128, 64


def symmetric_product(
    x_BRC: Tensor, add_BRR: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return beta * ``add`` + alpha * x xᵀ, [B, R, R] in x's type, accumulated in fp32.

    ``add`` is symmetric, and the result is exactly symmetric: blocks on and below the diagonal are
    computed and stored twice. The bits of a matrix do not depend on other matrices of the batch.
    """
    batch, rows, columns = x_BRC.shape
    x_BRC = x_BRC.contiguous()
    add_BRR = None if add_BRR is None else add_BRR.contiguous()
    y_BRR = torch.empty(batch, rows, rows, dtype=x_BRC.dtype, device=x_BRC.device)
    tiles = triton.cdiv(rows, _TILE)
    _symmetric_product[(tiles * (tiles + 1) // 2, batch)](
        x_BRC,
        x_BRC if add_BRR is None else add_BRR,
        y_BRR,
        rows,
        columns,
        alpha,
        beta,
        add_BRR is not None,
        _TILE,
        _DEPTH,
        num_warps=8,
        num_stages=3,
    )
    return y_BRR


@triton.jit
def _symmetric_product(
    x,
    add,
    y,
    rows,
    columns,
    alpha,
    beta,
    ADDS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Blocks are numbered row by row: row i of the lower triangle begins at i (i + 1) / 2.
    number = tl.program_id(0)
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    batch = tl.program_id(1).to(tl.int64)
    down = i * TILE + tl.arange(0, TILE)
    across = j * TILE + tl.arange(0, TILE)
    x += batch * rows * columns
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, columns, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + down[:, None] * columns + depth[None, :],
            mask=(down[:, None] < rows) & (depth[None, :] < columns),
            other=0.0,
        )
        right = tl.load(
            x + across[None, :] * columns + depth[:, None],
            mask=(across[None, :] < rows) & (depth[:, None] < columns),
            other=0.0,
        )
        total = tl.dot(left, right, total)
    total = total * alpha
    inside = (down[:, None] < rows) & (across[None, :] < rows)
    places = batch * rows * rows + down[:, None] * rows + across[None, :]
    if ADDS:
        total += beta * tl.load(add + places, mask=inside, other=0.0).to(tl.float32)
    result = total.to(y.dtype.element_ty)
    # In diagonal blocks, only elements on and below the diagonal.
    tl.store(y + places, result, mask=inside & (down[:, None] >= across[None, :]))
    mirrored = batch * rows * rows + across[:, None] * rows + down[None, :]
    above = (down[None, :] < rows) & (down[None, :] > across[:, None])
    tl.store(y + mirrored, tl.trans(result), mask=above)
