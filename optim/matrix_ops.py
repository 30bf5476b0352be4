"""Operations on unsharded matrices for update rules; the only interface of rules to other ranks.

A *logical matrix* is the unit of a rule: a parameter with one or two dimensions, or one expert of a
parameter [E, out, in]. M is their number: 1, or E. Rules compute with this rank's parts, plain
tensors, and call MatrixOps for sums over unsharded matrices and functions of them. ``parameters``
are always the parameters themselves (plain tensors or DTensors), which define the sharding of the
other arguments.
"""

# M logical matrices of a parameter, m of them with a part on this rank

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override


class Matrix(NamedTuple):
    """A logical matrix: index of its parameter in the list, and index of the expert (or 0)."""

    parameter: int
    expert: int


MatrixFunction = Callable[[Iterable[tuple[Matrix, Tensor]]], Iterable[tuple[Matrix, Tensor]]]
"""Function from unsharded matrices [out, in] with their ids to results with the same ids.

The function yields each result once, in any order. Results have the type of the arguments and are
new tensors, since an argument may be the caller's own part. Both sides are iterators, so only the
matrices that the function keeps exist at the same time.
"""


def one_by_one(function: Callable[[Tensor, Matrix], Tensor]) -> MatrixFunction:
    """Return a MatrixFunction that applies ``function`` to each matrix in turn."""
    return lambda matrices: ((which, function(matrix, which)) for which, matrix in matrices)


Cost = Callable[[int, int], float]
"""Function (out, in) -> work in any unit; a module-level function, since plans are cached by it."""


class MatrixOps(ABC):
    """Matrix operations for rules. All ranks of a stage make the same calls in the same order."""

    @abstractmethod
    def sums(self, parameters: Sequence[Tensor], partials: Sequence[Tensor]) -> list[Tensor]:
        """Return sums over unsharded logical matrices, fp64 [M] by parameter, on all ranks.

        ``partials``: the sums over this rank's parts, [m] for each parameter (``partial_sums``).
        One collective is used for all; a parameter may occur several times with different partial
        sums. For example, ``ops.sums(parameters, [partial_sums(part) for part in parts])``.
        """

    def squared_norms(self, parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Return Σx² of each logical matrix, fp64 [M] by parameter, from this rank's ``parts``."""
        return self.sums(parameters, squared_norms_of_parts(parts))

    @abstractmethod
    def factors(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        """Return the ``values`` [M] of this rank's part, shaped as its factors: [] or [m,1,1]."""

    @abstractmethod
    def owned(self, parameters: Sequence[Tensor], cost: Cost) -> list[Matrix]:
        """Return the logical matrices for which ``map`` calls the function on this rank.

        The result is always the same for the same parameters and cost, in ascending order, so a
        rule may keep states of a matrix on its owner only.
        """

    @abstractmethod
    def map(
        self,
        parameters: Sequence[Tensor],
        parts: Sequence[Tensor],
        function: MatrixFunction,
        cost: Cost,
    ) -> list[Tensor]:
        """Return this rank's parts of ``function`` applied to each unsharded logical matrix.

        ``parts`` are this rank's parts of the matrices, all of one type; they are sent in this
        type, so pass bf16 if the function computes in bf16. Each matrix is passed to the function
        on one rank only, its owner. The results are new tensors. For example, ``ops.map(parameters,
        parts, one_by_one(lambda x, which: -x), lambda r, c: 1.0)`` negates them.
        """


class LocalMatrixOps(MatrixOps):
    """MatrixOps of a single process with unsharded parameters."""

    @override
    def sums(self, parameters: Sequence[Tensor], partials: Sequence[Tensor]) -> list[Tensor]:
        assert len(parameters) == len(partials), (len(parameters), len(partials))
        return list(partials)

    @override
    def factors(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
        return [
            value.to(parameter.dtype).view((-1, 1, 1) if parameter.dim() == 3 else ())
            for parameter, value in zip(parameters, values, strict=True)
        ]

    @override
    def owned(self, parameters: Sequence[Tensor], cost: Cost) -> list[Matrix]:
        return [
            Matrix(i, e)
            for i, parameter in enumerate(parameters)
            for e in range(parameter.shape[0] if parameter.dim() == 3 else 1)
        ]

    @override
    def map(
        self,
        parameters: Sequence[Tensor],
        parts: Sequence[Tensor],
        function: MatrixFunction,
        cost: Cost,
    ) -> list[Tensor]:
        results = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]

        def one(tensors: Sequence[Tensor], which: Matrix) -> Tensor:
            tensor = tensors[which.parameter]
            return tensor[which.expert] if tensor.dim() == 3 else tensor

        def wholes() -> Iterator[tuple[Matrix, Tensor]]:
            for which in self.owned(parameters, cost):
                yield which, aligned(one(parts, which))

        for which, value in function(wholes()):
            one(results, which).copy_(value)
        return results


def partial_sums(part: Tensor) -> Tensor:
    """Return the sums over the logical matrices of this rank's part, fp64 [m]; 0 if empty."""
    wide = part.double()
    return wide.sum((1, 2)) if part.dim() == 3 else wide.sum().view(1)


class Products(NamedTuple):
    """Σx², Σxy and Σy² over each logical matrix of this rank's parts, fp64 [m] for each part."""

    xx: list[Tensor]
    xy: list[Tensor]
    yy: list[Tensor]


def products_of_parts(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Products:
    """Return the products of pairs of parts of equal shape, summed in fp64; 0 if empty."""
    on_cuda = any(x.is_cuda for x in xs)
    return _products_by_sums(xs, ys) if on_cuda else _products_on_cpu(xs, ys)


def _products_by_sums(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Products:
    xy = [
        torch.sum(x * y, (1, 2) if x.dim() == 3 else None, dtype=torch.float64).view(-1)
        for x, y in zip(xs, ys, strict=True)
    ]
    return Products(squared_norms_of_parts(xs), xy, squared_norms_of_parts(ys))


_CHUNK = 1 << 18  # elements: two fp64 copies of this size fit in a core's cache


def _products_on_cpu(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Products:
    """Return the products via fp64 copies of a few elements, in one reused buffer."""
    products = Products([], [], [])
    if not xs:
        return products
    most = max(x.numel() for x in xs)
    wide_2C = xs[0].new_empty(2, min(most, _CHUNK), dtype=torch.float64)
    for x, y in zip(xs, ys, strict=True):
        assert x.shape == y.shape, (x.shape, y.shape)
        stacked = x.dim() == 3
        lefts, rights = ([*z.flatten(1)] if stacked else [z.flatten()] for z in (x, y))
        pairs = zip(lefts, rights, strict=True)
        sums = [_three_products(left, right, wide_2C) for left, right in pairs]
        sums_m3 = torch.stack(sums) if sums else wide_2C.new_empty(0, 3)
        for each, of_matrices_m in zip(products, sums_m3.unbind(1), strict=True):
            each.append(of_matrices_m)
    return products


def _three_products(x_N: Tensor, y_N: Tensor, wide_2C: Tensor) -> Tensor:
    """Return Σx², Σxy, Σy², fp64 [3]."""
    total = None
    for x_C, y_C in zip(torch.split(x_N, _CHUNK), torch.split(y_N, _CHUNK), strict=True):
        a_C, b_C = (wide_C[: len(x_C)] for wide_C in wide_2C)
        a_C.copy_(x_C)
        b_C.copy_(y_C)
        here = torch.stack([a_C.dot(a_C), a_C.dot(b_C), b_C.dot(b_C)])
        total = here if total is None else total + here
    assert total is not None  # splitting an empty tensor gives one empty chunk
    return total


def squared_norms_of_parts(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return Σx² over each logical matrix of this rank's parts, summed in fp64: [m] each."""
    if not any(part.is_cuda for part in parts):
        return _squared_norms_on_cpu(parts)
    wide = torch.float64
    flat = [part for part in parts if part.dim() < 3]
    norms = iter(torch._foreach_norm(flat, 2, dtype=wide) if flat else ())
    return [
        torch.linalg.vector_norm(part, dim=(1, 2), dtype=wide).square()
        if part.dim() == 3
        else next(norms).square().view(1)
        for part in parts
    ]


def _squared_norms_on_cpu(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return the squared norms via one reused fp64 buffer.

    torch's norms in a wider type allocate a copy of each tensor, and the allocation costs more than
    the norm.
    """
    if not parts:
        return []
    wide = parts[0].new_empty(max(part.numel() for part in parts), dtype=torch.float64)
    squares = []
    for part in parts:
        copy = wide[: part.numel()].view(part.shape).copy_(part)
        rows = copy.flatten(1) if part.dim() == 3 else copy.view(1, part.numel())
        squares.append(torch.linalg.vector_norm(rows, dim=1).square())
    return squares


def aligned(matrix: Tensor) -> Tensor:
    """Return a contiguous matrix at an aligned address; a copy if necessary.

    Some kernels sum in another order if a tensor starts at an unaligned address.
    """
    odd = matrix.storage_offset() * matrix.element_size() % 512
    return matrix.clone(memory_format=torch.contiguous_format) if odd else matrix.contiguous()
