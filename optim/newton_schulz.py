"""Making a matrix orthogonal by matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]
"""(a, b, c) of one iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X."""

MUON: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 5
"""Steepest at 0; takes singular values into about [0.7, 1.2] (K. Jordan, 2024)."""

DION: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Others for each iteration; takes singular values above 0.01 or so into [0.97, 1.04]."""


def newton_schulz(
    matrix: Tensor,
    coefficients: Sequence[Coefficients],
    *,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return about UVᵀ of matrix = USVᵀ, [out, in], computed and returned in ``dtype``.

    Source: https://kellerjordan.github.io/posts/muon/. With ``MUON`` the bits are those of
    torch.optim.Muon, whose order of operations this keeps. The matrix is divided by its Frobenius
    norm, or by ``eps`` where that is larger: zeros stay zeros. Always one matrix: batched products
    round differently for different batches, and layouts batch differently.
    """
    assert matrix.dim() == 2, matrix.shape
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    if tall:  # the Gram matrix is then of the smaller side
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def newton_schulz_cost(rows: int, columns: int) -> float:
    """Return multiply-adds of one iteration for a matrix [rows, columns]."""
    least, most = sorted((rows, columns))
    return float(least * least * (2 * most + least))
