"""Products of rows with the matrix of the group they belong to, and moving rows to their groups.

Rows are sorted by group, so a group is a stretch of rows. Nothing here adds with atomics: the same
input gives the same bits.
"""

# T tokens, k experts that a token visits, S = T*k rows, E groups (experts), D and F widths

from __future__ import annotations

from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from allometry.models import fp8
from allometry.models.products import COMPUTE, Joined, Stacked, join

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return [S, F]: each row times the transposed matrix of its group.

    The first ``counts_E[0]`` rows belong to group 0, the next to group 1 and so on; the counts add
    up to S and stay on the device. A group without rows, or no row at all, is fine: its gradient
    is zero. Where torch has no kernel for this type or alignment, a loop over groups does it,
    which waits for the counts on a GPU.
    """
    if _looped(x_SD, (weight_EFD,)):
        return loop_linear(x_SD, weight_EFD, counts_E)
    y_SF: Tensor = _GroupedLinear.apply(x_SD, _offsets(counts_E), None, *COMPUTE, weight_EFD)
    return y_SF


def multiply_groups(x_SD: Tensor, stacked: Stacked, counts_E: Tensor) -> Joined:
    """Return ``grouped_linear`` of the weights [E, F, D]: ``products.multiply`` for groups."""
    if stacked.watch is not None:
        stacked.watch(x_SD)
    if stacked.saves or stacked.recipe:
        return _multiply_in_fp8(x_SD, stacked, counts_E)
    weights = stacked.weights()
    if not stacked.joins(x_SD.dtype):
        made = tuple(grouped_linear(x_SD, weight, counts_E) for weight in weights)
        return made[0] if len(made) == 1 else made
    if stacked.plain or not torch.is_grad_enabled():
        return grouped_linear(x_SD, stacked.joined(x_SD.dtype), counts_E)
    if _looped(x_SD, weights):
        return loop_linear(x_SD, join(weights, x_SD.dtype), counts_E)
    y_SF: Tensor = _GroupedLinear.apply(x_SD, _offsets(counts_E), stacked.copy, *COMPUTE, *weights)
    return y_SF


def _multiply_in_fp8(x_SD: Tensor, stacked: Stacked, counts_E: Tensor) -> Tensor:
    offsets_E = _offsets(counts_E)
    if not torch.is_grad_enabled():
        return _forward(x_SD, stacked.joined(x_SD.dtype), offsets_E, stacked.recipe)[0]
    how = stacked.saves, stacked.recipe, stacked.gradients
    y: Tensor = _GroupedLinear.apply(x_SD, offsets_E, stacked.copy, *how, *stacked.weights())
    return y


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _looped(x_SD: Tensor, weights: tuple[Tensor, ...]) -> bool:
    # Without values there is nothing to loop over, and a compiler cannot trace a loop of data.
    traced = torch.compiler.is_compiling() or isinstance(x_SD, FakeTensor)
    return not traced and not all(_has_kernel(x_SD.dtype, w.shape) for w in weights)


def loop_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return what ``grouped_linear`` returns, group by group: its plain twin."""
    groups = x_SD.split(counts_E.tolist())
    # Unbound at once: each index of its own would give a gradient as large as all groups.
    matrices = weight_EFD.unbind()
    return torch.cat([x @ weight.T for x, weight in zip(groups, matrices, strict=True)])


def _has_kernel(dtype: torch.dtype, shape_EFD: torch.Size) -> bool:
    aligned = all(size * dtype.itemsize % _ALIGNMENT_BYTES == 0 for size in shape_EFD[1:])
    return aligned and dtype in _KERNEL_TYPES and hasattr(torch, "_grouped_mm")


@torch.library.custom_op("allometry::_grouped_mm", mutates_args=())
def _opaque_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """What the compiler calls without looking in: the kernel, or a loop where there is none."""
    widths = b.shape if b.ndim == 3 else torch.Size((1, a.shape[0], b.shape[1]))
    if _has_kernel(a.dtype, widths) and not _by_onednn(a):
        return torch._grouped_mm(a, b, offsets_E)
    return _looped_mm(a, b, offsets_E)


@_opaque_mm.register_fake
def _(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    rows = () if b.ndim == 3 else offsets_E.shape
    return a.new_empty(*rows, a.shape[0], b.shape[-1])


def _grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Return a's stretches of rows times the matrices of ``b``, or stretches of both [E, ...]."""
    widths = b.shape if b.ndim == 3 else torch.Size((1, a.shape[0], b.shape[1]))
    # While tracing, and without values, torch believes that its kernel takes bf16 alone.
    if torch.compiler.is_compiling() or isinstance(a, FakeTensor):
        known = a.dtype == torch.bfloat16 and b.ndim == 3 and _has_kernel(a.dtype, b.shape)
        if not known or _by_onednn(a):
            return _opaque_mm(a, b, offsets_E)
    looped = _by_onednn(a) or not _has_kernel(a.dtype, widths)
    return _looped_mm(a, b, offsets_E) if looped else torch._grouped_mm(a, b, offsets_E)


def _by_onednn(a: Tensor) -> bool:
    """Whether a product is oneDNN's, which generates code for each number of rows and keeps it."""
    return a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16)


def _looped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Return what ``_grouped_mm`` returns, group by group, each of a ``rounded`` number of rows.

    Rows that fill a group up are the next group's where results are dropped, zeros where they are
    added up.
    """
    groups = list(enumerate(pairwise([0, *offsets_E.tolist()])))
    if b.ndim == 3:
        y = a.new_empty(a.shape[0], b.shape[2])
        for e, (start, end) in groups:
            if end > start:
                rows = rounded(end - start)
                y[start:end] = (_filled(a[start : start + rows], rows) @ b[e])[: end - start]
        return y
    y = a.new_zeros(len(groups), a.shape[0], b.shape[1])
    for e, (start, end) in groups:
        if end > start:
            rows = rounded(end - start)
            left, right = (_filled(x[start:end], rows) for x in (a.t(), b))
            torch.mm(left.t(), right, out=y[e])
    return y


def rounded(rows: int) -> int:
    """Return a number of rows, at most 15 or 1/16 more, of which there are 16 in each octave.

    Experts have other numbers of rows in every micro-batch; with each of them the memory of
    oneDNN's kernels grew.
    """
    step = max(16, 1 << max(rows.bit_length() - 5, 0))
    return -(-rows // step) * step


def _filled(x_SD: Tensor, rows: int) -> Tensor:
    """Return ``x_SD`` with rows of zeros at the end, ``rows`` in all."""
    return x_SD if len(x_SD) == rows else F.pad(x_SD, (0, 0, 0, rows - len(x_SD)))


class _GroupedLinear(torch.autograd.Function):
    """torch's grouped product with a backward pass that survives what its own does not.

    torch's own fails where the incoming gradient is not contiguous (an expanded sum) and where
    there are no rows, and on Blackwell leaves the gradients of empty groups unset
    (pytorch/pytorch#172439).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        offsets_E: Tensor,
        whole_EFD: Tensor | None,
        saves: bool,
        recipe: str,
        gradients: torch.dtype,
        *weights: Tensor,
    ) -> Tensor:
        x_SD = x_SD.contiguous()
        ctx.widths = [weight.shape[1] for weight in weights]
        ctx.dtype, ctx.compute = weights[0].dtype, x_SD.dtype
        ctx.saves, ctx.recipe, ctx.gradients = saves, recipe, gradients
        joined = join(weights, x_SD.dtype) if whole_EFD is None else whole_EFD
        y_SF, small = _forward(x_SD, joined, offsets_E, recipe)
        kept = (x_SD,) if not saves else fp8.save(x_SD) if small is None else small
        # What is no step's copy is made again: FSDP2 frees weights, and gathers them for backward.
        ctx.save_for_backward(*kept, offsets_E, *(weights if whole_EFD is None else (whole_EFD,)))
        return y_SF

    @staticmethod
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, *kept = ctx.saved_tensors
        if ctx.saves:
            block = _BLOCKS[ctx.recipe][0] if ctx.recipe else fp8.SAVED
            x_SD = fp8.dequantise(fp8.Quantised(x_SD, kept.pop(0)), block, ctx.compute)
        offsets_E, *kept = kept
        whole_EFD = join(tuple(kept), x_SD.dtype)
        grad_x = grad_weight = None
        if x_SD.shape[0] == 0:
            grad_x, grad_weight = torch.zeros_like(x_SD), torch.zeros_like(whole_EFD)
        else:
            grad_SF = grad_SF.contiguous()
            if ctx.needs_input_grad[0]:
                matrices = whole_EFD.transpose(-2, -1)
                grad_x = _product(grad_SF, matrices, offsets_E, ctx.recipe, ctx.gradients)[0]
            if any(ctx.needs_input_grad[6:]):
                grad_weight = _grouped_mm(grad_SF.t(), x_SD, offsets_E)
                if grad_weight.is_cuda:
                    grad_weight = _with_zeros(grad_weight, offsets_E)
        made: list[Tensor | None] = [None] * len(ctx.widths)
        if grad_weight is not None:
            made = [part.to(ctx.dtype) for part in grad_weight.split(ctx.widths, dim=1)]
        return grad_x, None, None, None, None, None, *made


# Scales of activations and weights. torch's kernel takes those of rows alone, and one for all rows
# would be of rows that meet at an expert.
_ROWS = (fp8.ACTIVATION_BLOCKS["fp8_rowwise"], fp8.WEIGHT_BLOCKS["fp8_rowwise"])
_BLOCKS: dict[str, tuple[fp8.Block, fp8.Block]] = {
    "fp8_tensorwise": _ROWS,
    "fp8_rowwise": _ROWS,
    "fp8_blockwise": (fp8.ACTIVATION_BLOCKS["fp8_blockwise"], fp8.WEIGHT_BLOCKS["fp8_blockwise"]),
}


def _forward(
    x_SD: Tensor, whole_EFD: Tensor, offsets_E: Tensor, recipe: str
) -> tuple[Tensor, fp8.Quantised | None]:
    if x_SD.shape[0] == 0:
        small = fp8.quantise(x_SD, _BLOCKS[recipe][0]) if recipe else None
        return x_SD.new_zeros(0, whole_EFD.shape[1]), small
    return _product(x_SD, whole_EFD, offsets_E, recipe, fp8.E4M3)


def _product(
    x_SK: Tensor, matrices_ENK: Tensor, offsets_E: Tensor, recipe: str, dtype: torch.dtype
) -> tuple[Tensor, fp8.Quantised | None]:
    """Return each row times the transposed matrix of its group, and x as ``dtype`` where read so.

    FP8 on CUDA, rows under a scale each; elsewhere the same numbers in fp32.
    """
    if not recipe:
        return _grouped_mm(x_SK, matrices_ENK.transpose(-2, -1), offsets_E), None
    block, of_weights = _BLOCKS[recipe]
    x, weights = fp8.quantise(x_SK, block, dtype), fp8.quantise(matrices_ENK, of_weights)
    if x_SK.is_cuda:
        return fp8.grouped_on_cuda(x, weights, offsets_E, x_SK.dtype), x
    wide = torch.promote_types(x_SK.dtype, torch.float32)
    left = fp8.dequantise(x, block, wide)
    right = fp8.dequantise(weights, of_weights, wide).transpose(-2, -1)
    return _grouped_mm(left, right, offsets_E).to(x_SK.dtype), x


def _with_zeros(grad_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """Return gradients that are zeros for groups without rows, which torch's kernel leaves unset.

    Compiled, it is part of the pass that casts the gradient; else in place, for those groups alone.
    """
    traced = torch.compiler.is_compiling() or isinstance(grad_EFD, FakeTensor)
    if not traced and grad_EFD.is_contiguous() and find_spec("triton") is not None:
        from allometry.models.grouped_cuda import zero_empty_groups_

        zero_empty_groups_(grad_EFD, offsets_E)
        return grad_EFD
    empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    return grad_EFD.masked_fill(empty_E[:, None, None], 0.0)


class Sorting(NamedTuple):
    """Where the visits of tokens to experts go when they are sorted by expert.

    ``token_S``: the token of each sorted row. ``row_Tk``: the sorted row of each visit.
    ``counts_E``: rows of each expert.
    """

    token_S: Tensor
    row_Tk: Tensor
    counts_E: Tensor


def sort_by_expert(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Sort visits by expert; those to one expert stay in the order of tokens.

    The experts of a token are different ones. Nothing waits for the device.
    """
    if experts_Tk.device.type == "cpu":  # whose sort of small numbers is faster than counting
        return sorted_by_sort(experts_Tk, num_experts)
    return sorted_by_counting(experts_Tk, num_experts)


def sorted_by_counting(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` from one running sum over a table [E, T] of who visits whom.

    Read row by row, the visits in the table come in their sorted order already: a visit's place is
    the number of visits up to it. One scan of E*T numbers, where a sort reads and writes all S rows
    several times.
    """
    T, k = experts_Tk.shape
    visited_ET = torch.zeros(num_experts, T, dtype=torch.int32, device=experts_Tk.device)
    visited_ET = visited_ET.scatter(0, experts_Tk.t(), 1)
    # Flat, as a GPU's scan of one row is faster than its scans of many.
    upto_ET = visited_ET.flatten().cumsum(0, dtype=torch.int32)
    tokens_T = torch.arange(T, device=experts_Tk.device)
    row_Tk = upto_ET[experts_Tk * T + tokens_T[:, None]].long() - 1
    token_S = torch.empty(T * k, dtype=torch.int64, device=experts_Tk.device)
    token_S = token_S.scatter(0, row_Tk.flatten(), tokens_T[:, None].expand(T, k).flatten())
    return Sorting(token_S, row_Tk, counts_E=visited_ET.sum(1))


def sorted_by_sort(experts_Tk: Tensor, num_experts: int) -> Sorting:
    """Return ``sort_by_expert`` by a stable sort of all visits: its plain twin."""
    chosen_S = experts_Tk.flatten()
    sorted_S, order_S = chosen_S.sort(stable=True)
    visits_S = torch.arange(chosen_S.shape[0], device=chosen_S.device)
    row_S = torch.empty_like(order_S).scatter(0, order_S, visits_S)
    ends_E = torch.searchsorted(
        sorted_S, torch.arange(num_experts, device=chosen_S.device), right=True
    )
    return Sorting(
        token_S=order_S // experts_Tk.shape[1],
        row_Tk=row_S.view(experts_Tk.shape),
        counts_E=ends_E.diff(prepend=ends_E.new_zeros(1)),
    )


def spread_rows(x_TD: Tensor, sorting: Sorting) -> Tensor:
    """Return [S, D]: the token of each sorted row."""
    x_SD: Tensor = _Spread.apply(x_TD, sorting.token_S, sorting.row_Tk)
    return x_SD


def gather_rows(y_SD: Tensor, gates_Tk: Tensor, sorting: Sorting) -> Tensor:
    """Return [T, D] in y's type: the sum of each token's rows times its gates, added in fp32."""
    y_TD: Tensor = _Gather.apply(y_SD, gates_Tk, sorting.token_S, sorting.row_Tk)
    return y_TD


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Spread(torch.autograd.Function):
    """Indexing whose gradient reads rows; autograd's own would scatter them with atomics."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_S: Tensor, row_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(row_Tk)
        return x_TD[token_S]

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        (row_Tk,) = ctx.saved_tensors
        # A visit at a time: all at once would hold k times the tokens in fp32.
        grad_TD = grad_SD[row_Tk[:, 0]].to(_wide(grad_SD.dtype))
        for visit in range(1, row_Tk.shape[1]):
            grad_TD = grad_TD + grad_SD[row_Tk[:, visit]]
        return grad_TD.to(grad_SD.dtype), None, None


class _Gather(torch.autograd.Function):
    """The weighted sum over visits, keeping the sorted rows only once and not widened."""

    @staticmethod
    def forward(
        ctx: Any, y_SD: Tensor, gates_Tk: Tensor, token_S: Tensor, row_Tk: Tensor
    ) -> Tensor:
        # In the compute type always: where a layout cuts experts, rows are summands of each rank.
        ctx.save_for_backward(y_SD, gates_Tk, token_S, row_Tk)
        y_TD = y_SD[row_Tk[:, 0]].to(_wide(y_SD.dtype)) * gates_Tk[:, :1]
        for visit in range(1, row_Tk.shape[1]):
            y_TD = y_TD + y_SD[row_Tk[:, visit]] * gates_Tk[:, visit : visit + 1]
        return y_TD.to(y_SD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_SD, gates_Tk, token_S, row_Tk = ctx.saved_tensors
        gates_S = gates_Tk.flatten()
        gates_S = torch.empty_like(gates_S).scatter(0, row_Tk.flatten(), gates_S)
        grad_SD = (grad_TD[token_S] * gates_S[:, None]).to(y_SD.dtype)
        wide = _wide(y_SD.dtype)
        grad_gates = [
            (y_SD[row_Tk[:, visit]].to(wide) * grad_TD).sum(1) for visit in range(row_Tk.shape[1])
        ]
        return grad_SD, torch.stack(grad_gates, dim=1).to(gates_Tk.dtype), None, None
