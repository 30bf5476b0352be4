"""Operations of update rules on full matrices, without sharding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from allometry.optim import matrix_ops
from allometry.optim.matrix_ops import (
    LocalMatrixOps,
    Matrix,
    one_by_one,
    partial_sums,
    products_of_parts,
    squared_norms_of_parts,
)
from rule_groups import normal

SHAPES: list[tuple[int, ...]] = [(4, 6), (3, 2, 5), (7,)]
PARAMETERS = [normal(f"{shape}", shape) for shape in SHAPES]


def cost(rows: int, columns: int) -> float:
    return float(rows * columns)


def test_sums_and_norms_are_those_of_each_matrix_in_float64() -> None:
    ops = LocalMatrixOps()
    found = ops.squared_norms(PARAMETERS, PARAMETERS)
    assert [(len(f), f.dtype) for f in found] == [(n, torch.float64) for n in (1, 3, 1)]
    for parameter, norms in zip(PARAMETERS, found, strict=True):
        matrices = parameter if parameter.dim() == 3 else parameter[None]
        expected = torch.stack([matrix.double().square().sum() for matrix in matrices])
        torch.testing.assert_close(norms, expected, rtol=1e-14, atol=0)
    partials = [*map(partial_sums, PARAMETERS), *squared_norms_of_parts(PARAMETERS)]
    empty = squared_norms_of_parts([torch.ones(0, 4), torch.ones(2, 0, 4), torch.ones(2, 2)])
    assert [norms.tolist() for norms in empty] == [[0.0], [0.0, 0.0], [4.0]]
    twice = ops.sums([*PARAMETERS, *PARAMETERS], partials)
    assert all(torch.equal(one, other) for one, other in zip(twice, partials, strict=True))
    with pytest.raises(AssertionError):
        ops.sums(PARAMETERS, partials)


@pytest.mark.parametrize("path", ["cpu", "cpu in chunks", "cuda's"])
def test_products_are_those_of_each_matrix_in_float64(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU path multiplies in fp32 and accumulates in fp64."""
    products = matrix_ops._products_by_sums if path == "cuda's" else products_of_parts
    if path == "cpu in chunks":
        monkeypatch.setattr(matrix_ops, "_CHUNK", 5)
    others = [normal(f"other {shape}", shape).bfloat16() for shape in SHAPES]
    found = products(PARAMETERS, others)
    pairs = ((PARAMETERS, PARAMETERS), (PARAMETERS, others), (others, others))
    error = 1e-6 if path == "cuda's" else 1e-13
    for sums, (xs, ys) in zip(found, pairs, strict=True):
        assert [(len(one), one.dtype) for one in sums] == [(n, torch.float64) for n in (1, 3, 1)]
        for one, x, y in zip(sums, xs, ys, strict=True):
            product = x.double() * y.double()
            expected = product.sum((1, 2)) if x.dim() == 3 else product.sum().view(1)
            torch.testing.assert_close(one, expected, rtol=error, atol=error)
    empty = [torch.ones(0, 4), torch.ones(2, 0, 4), torch.ones(0, 2, 2)]
    for sums in products(empty, empty):
        assert [one.tolist() for one in sums] == [[0.0], [0.0, 0.0], []]
    assert products([], []).xx == []


def test_factors_multiply_the_matrices_they_are_of() -> None:
    values = [torch.arange(1.0, n + 1).double() for n in (1, 3, 1)]
    factors = LocalMatrixOps().factors(PARAMETERS, values)
    assert [factor.shape for factor in factors] == [(), (3, 1, 1), ()]
    assert all(factor.dtype == torch.float32 for factor in factors)
    scaled = PARAMETERS[1] * factors[1]
    assert torch.equal(scaled[2], PARAMETERS[1][2] * 3.0)


def test_a_function_is_called_once_for_each_matrix_and_leaves_parts_alone() -> None:
    matrices = PARAMETERS[:2]
    before = [matrix.clone() for matrix in matrices]
    calls: list[Matrix] = []

    def function(matrix: Tensor, which: Matrix) -> Tensor:
        assert matrix.dim() == 2
        calls.append(which)
        return matrix.T.contiguous().T * (1 + len(calls))  # an unusual memory layout

    ops = LocalMatrixOps()
    found = ops.map(matrices, matrices, one_by_one(function), cost)
    assert calls == ops.owned(matrices, cost) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert torch.equal(found[0], before[0] * 2)
    assert torch.equal(found[1], before[1] * torch.tensor([3.0, 4.0, 5.0]).view(3, 1, 1))
    assert all(result.is_contiguous() for result in found)
    assert all(torch.equal(now, then) for now, then in zip(matrices, before, strict=True))
