"""Grouped matrix products: each row times the matrix of its group.

Rows are sorted by group (``visits.py``), so a group is a contiguous range of rows. No kernel here
uses atomic additions, so equal inputs give bitwise equal outputs.
"""

# T tokens, S rows sorted by group, E groups (experts), D and F widths

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from allometry.models import fp8
from allometry.models.products import COMPUTE, Joined, Stacked, chosen, join, placed
from allometry.models.quantiser import quantise, save

_KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return [S, F]: each row times the transposed matrix of its group.

    The first ``counts_E[0]`` rows belong to group 0, the next to group 1 and so on; the sum of the
    counts is S, and the counts stay on the device. Groups without rows are allowed, also S = 0;
    their gradient is zero. If torch has no kernel for this type or alignment, a loop over groups
    computes the product and, on a GPU, waits for the counts.
    """
    if _looped(x_SD, (weight_EFD,)):
        return loop_linear(x_SD, weight_EFD, counts_E)
    offsets_E = _offsets(counts_E)
    y_SF: Tensor = _GroupedLinear.apply(x_SD, None, None, offsets_E, None, *COMPUTE, weight_EFD)
    return y_SF


class Tokens(NamedTuple):
    """``kept``: tokens [T, D] in FP8 as the input of a product; ``token_S``: token of each row.

    The rounding of a token does not depend on other rows, so backward keeps the T tokens instead of
    k rows for each.
    """

    kept: fp8.Quantised
    token_S: Tensor

    @classmethod
    def of(
        cls, x_TD: Tensor, token_S: Tensor, stacked: Stacked, kept: fp8.Quantised | None
    ) -> Self:
        """Round tokens to FP8, or use ``kept`` from ``fp8.save`` if rows and blocks match."""
        if kept is None or stacked.recipe or len(kept.values) != len(x_TD):
            block = _BLOCKS[stacked.recipe][0] if stacked.recipe else fp8.SAVED
            scale_dtype = torch.float32 if stacked.recipe else torch.bfloat16
            with torch.no_grad():
                kept = quantise(x_TD, block, scale_dtype=scale_dtype, fused=stacked.fused)
        return cls(kept, token_S)

    def rows(self) -> fp8.Quantised:
        """Return the FP8 rows [S, D]."""
        values = self.kept.values.view(torch.uint8)[self.token_S].view(self.kept.values.dtype)
        return fp8.Quantised(values, self.kept.scales[self.token_S])


def multiply_groups(
    x_SD: Tensor, stacked: Stacked, counts_E: Tensor, tokens: Tokens | None = None
) -> Joined:
    """Return ``grouped_linear`` of the weights [E, F, D]: ``products.multiply`` for groups.

    ``tokens``: the tokens that ``x_SD`` was gathered from, if the input is saved in FP8.
    """
    if stacked.watch is not None:
        stacked.watch(x_SD)
    if stacked.saves or stacked.recipe:
        return _multiply_in_fp8(x_SD, stacked, counts_E, tokens)
    weights = stacked.weights()
    if not stacked.joins(x_SD.dtype):
        made = tuple(grouped_linear(x_SD, weight, counts_E) for weight in weights)
        return made[0] if len(made) == 1 else made
    if stacked.plain or not torch.is_grad_enabled():
        return grouped_linear(x_SD, stacked.joined(x_SD.dtype), counts_E)
    if _looped(x_SD, weights):
        return loop_linear(x_SD, join(weights, x_SD.dtype), counts_E)
    how = _offsets(counts_E), stacked.copy, *COMPUTE
    y_SF: Tensor = _GroupedLinear.apply(x_SD, None, None, *how, *weights)
    return y_SF


def _multiply_in_fp8(
    x_SD: Tensor, stacked: Stacked, counts_E: Tensor, tokens: Tokens | None
) -> Tensor:
    offsets_E, ready = _offsets(counts_E), stacked.taken(x_SD)
    if tokens is not None and stacked.recipe:
        ready = tokens.rows()
    if not torch.is_grad_enabled():
        how = stacked.recipe, stacked.fused, ready
        return _forward(x_SD, stacked.joined(x_SD.dtype), offsets_E, *how)[0]
    y: Tensor = _GroupedLinear.apply(
        *(x_SD, ready, tokens, offsets_E, stacked.copy), *stacked.how, *stacked.weights()
    )
    return y


def _offsets(counts_E: Tensor) -> Tensor:
    return counts_E.cumsum(0).to(torch.int32)


def _looped(x_SD: Tensor, weights: tuple[Tensor, ...]) -> bool:
    # Fake tensors have no values to loop over, and the compiler cannot trace a loop over data.
    traced = torch.compiler.is_compiling() or isinstance(x_SD, FakeTensor)
    return not traced and not all(_has_kernel(x_SD.dtype, w.shape) for w in weights)


def loop_linear(x_SD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Return ``grouped_linear`` computed group by group: the reference."""
    groups = x_SD.split(counts_E.tolist())
    # One unbind: indexing each matrix would give each a gradient as large as all groups.
    matrices = weight_EFD.unbind()
    return torch.cat([x @ weight.T for x, weight in zip(groups, matrices, strict=True)])


def _has_kernel(dtype: torch.dtype, shape_EFD: torch.Size) -> bool:
    aligned = all(size * dtype.itemsize % _ALIGNMENT_BYTES == 0 for size in shape_EFD[1:])
    return aligned and dtype in _KERNEL_TYPES and hasattr(torch, "_grouped_mm")


@torch.library.custom_op("allometry::_grouped_mm", mutates_args=())
def _opaque_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Compute ``_grouped_mm`` as an opaque operator for the compiler: torch's kernel or a loop."""
    widths = b.shape if b.ndim == 3 else torch.Size((1, a.shape[0], b.shape[1]))
    if _has_kernel(a.dtype, widths) and not _by_onednn(a):
        return torch._grouped_mm(a, b, offsets_E)
    return _looped_mm(a, b, offsets_E)


@_opaque_mm.register_fake
def _(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    rows = () if b.ndim == 3 else offsets_E.shape
    return a.new_empty(*rows, a.shape[0], b.shape[-1])


def _grouped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Return row ranges of ``a`` times the matrices of ``b``, or [E, ...] from ranges of both."""
    widths = b.shape if b.ndim == 3 else torch.Size((1, a.shape[0], b.shape[1]))
    # When tracing or with fake tensors, torch accepts only bf16 for this kernel.
    if torch.compiler.is_compiling() or isinstance(a, FakeTensor):
        known = a.dtype == torch.bfloat16 and b.ndim == 3 and _has_kernel(a.dtype, b.shape)
        if not known or _by_onednn(a):
            return _opaque_mm(a, b, offsets_E)
    looped = _by_onednn(a) or not _has_kernel(a.dtype, widths)
    return _looped_mm(a, b, offsets_E) if looped else torch._grouped_mm(a, b, offsets_E)


def _by_onednn(a: Tensor) -> bool:
    """Return True if oneDNN computes the product: it compiles and caches a kernel per row count."""
    return a.device.type == "cpu" and a.dtype in (torch.bfloat16, torch.float16)


def _looped_mm(a: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Return ``_grouped_mm`` computed group by group, with row counts ``rounded`` up.

    If ``b`` has matrices, the extra rows come from the next group and their results are dropped;
    in sums over rows, the extra rows are zeros.
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
    """Round a number of rows up, by at most 15 rows or 1/16, to one of 16 values per octave.

    The number of an expert's rows changes in every micro-batch; without rounding, oneDNN caches a
    kernel for each number and its memory grows. For example, 100 becomes 112 and 1000 becomes 1024.
    """
    step = max(16, 1 << max(rows.bit_length() - 5, 0))
    return -(-rows // step) * step


def _filled(x_SD: Tensor, rows: int) -> Tensor:
    """Return ``x_SD`` padded with zero rows to ``rows`` rows."""
    return x_SD if len(x_SD) == rows else F.pad(x_SD, (0, 0, 0, rows - len(x_SD)))


class _GroupedLinear(torch.autograd.Function):
    """torch's grouped product with its own backward pass.

    torch's backward fails if the incoming gradient is not contiguous (an expanded sum) or if there
    are no rows, and on Blackwell leaves the gradients of empty groups uninitialised
    (pytorch/pytorch#172439).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        ready: fp8.Quantised | None,
        tokens: Tokens | None,
        offsets_E: Tensor,
        whole_EFD: Tensor | None,
        saves: bool,
        recipe: str,
        gradients: torch.dtype,
        fused: bool,
        *weights: Tensor,
    ) -> Tensor:
        x_SD = x_SD.contiguous()
        ctx.widths = [weight.shape[1] for weight in weights]
        ctx.dtype, ctx.compute = weights[0].dtype, x_SD.dtype
        ctx.saves, ctx.recipe, ctx.gradients, ctx.fused = saves, recipe, gradients, fused
        joined = join(weights, x_SD.dtype) if whole_EFD is None else whole_EFD
        y_SF, small = _forward(x_SD, joined, offsets_E, recipe, fused, ready)
        ctx.by_token = saves and tokens is not None
        kept: tuple[Tensor, ...] = ()
        if not any(ctx.needs_input_grad[9:]):
            pass  # only gradients of trained weights read x
        elif saves and tokens is not None:
            kept = *tokens.kept, tokens.token_S
        else:
            kept = (x_SD,) if not saves else small or ready or save(x_SD, fused=fused)
        ctx.kept = len(kept)
        # Without a step's copy, join again in backward: FSDP2 frees weights and gathers them again.
        ctx.save_for_backward(*kept, offsets_E, *(weights if whole_EFD is None else (whole_EFD,)))
        return y_SF

    @staticmethod
    def backward(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: checkpointing recomputes and unpacks them only once
        kept, (offsets_E, *weights) = saved[: ctx.kept], saved[ctx.kept :]
        grad_SF, grad_x = grad_SF.contiguous(), None
        rows = grad_SF.shape[0]
        if ctx.needs_input_grad[0]:
            whole_EFD = join(tuple(weights), ctx.compute)
            matrices, how = whole_EFD.transpose(-2, -1), (ctx.recipe, ctx.gradients, ctx.fused)
            grad_x = grad_SF.new_zeros(0, whole_EFD.shape[2])
            if rows:
                grad_x = _product(grad_SF, matrices, offsets_E, *how)[0]
        trained: Sequence[bool] = ctx.needs_input_grad[9:]
        made: list[Tensor | None] = [None] * len(ctx.widths)
        if kept:
            x_SD = _restored(ctx, kept)
            widths = [n for n, wanted in zip(ctx.widths, trained, strict=True) if wanted]
            chosen_SF = chosen(grad_SF, ctx.widths, trained).contiguous()
            if rows:
                of_weights = _grouped_mm(chosen_SF.t(), x_SD, offsets_E)
                if of_weights.is_cuda:
                    of_weights = _with_zeros(of_weights, offsets_E)
            else:
                shape = len(offsets_E), sum(widths), x_SD.shape[1]
                of_weights = x_SD.new_zeros(shape)
            parts = of_weights.split(widths, dim=1)
            made = placed((part.to(ctx.dtype) for part in parts), trained)
        return grad_x, *[None] * 8, *made


def _restored(ctx: Any, kept: tuple[Tensor, ...]) -> Tensor:
    if not ctx.saves:
        return kept[0]
    values, scales, *token_S = kept
    block = _BLOCKS[ctx.recipe][0] if ctx.recipe else fp8.SAVED
    x_SD = fp8.dequantise(fp8.Quantised(values, scales), block, ctx.compute)
    return x_SD[token_S[0]] if ctx.by_token else x_SD


# Blocks of activations and weights. torch's grouped kernel supports only row scales, and one scale
# for all rows would depend on the rows that visit an expert together.
_ROWS = (fp8.ACTIVATION_BLOCKS["fp8_rowwise"], fp8.WEIGHT_BLOCKS["fp8_rowwise"])
_BLOCKS: dict[str, tuple[fp8.Block, fp8.Block]] = {
    "fp8_tensorwise": _ROWS,
    "fp8_rowwise": _ROWS,
    "fp8_blockwise": (fp8.ACTIVATION_BLOCKS["fp8_blockwise"], fp8.WEIGHT_BLOCKS["fp8_blockwise"]),
}


def _forward(
    x_SD: Tensor,
    whole_EFD: Tensor,
    offsets_E: Tensor,
    recipe: str,
    fused: bool,
    ready: fp8.Quantised | None,
) -> tuple[Tensor, fp8.Quantised | None]:
    if x_SD.shape[0] == 0:
        small = fp8.quantise(x_SD, _BLOCKS[recipe][0]) if recipe else None
        return x_SD.new_zeros(0, whole_EFD.shape[1]), small
    return _product(x_SD, whole_EFD, offsets_E, recipe, fp8.E4M3, fused, ready)


def _product(
    x_SK: Tensor,
    matrices_ENK: Tensor,
    offsets_E: Tensor,
    recipe: str,
    dtype: torch.dtype,
    fused: bool = False,
    ready: fp8.Quantised | None = None,
) -> tuple[Tensor, fp8.Quantised | None]:
    """Return each row times the transposed matrix of its group, and the FP8 copy of x or None.

    On CUDA an FP8 kernel with one scale per row; on other devices the same FP8 numbers in fp32.
    """
    if not recipe:
        return _grouped_mm(x_SK, matrices_ENK.transpose(-2, -1), offsets_E), None
    block, of_weights = _BLOCKS[recipe]
    x = quantise(x_SK, block, dtype, fused=fused) if ready is None else ready
    weights = quantise(matrices_ENK, of_weights, fused=fused)
    if x_SK.is_cuda:
        return fp8.grouped_on_cuda(x, weights, offsets_E, x_SK.dtype), x
    wide = torch.promote_types(x_SK.dtype, torch.float32)
    left = fp8.dequantise(x, block, wide)
    right = fp8.dequantise(weights, of_weights, wide).transpose(-2, -1)
    return _grouped_mm(left, right, offsets_E).to(x_SK.dtype), x


def _with_zeros(grad_EFD: Tensor, offsets_E: Tensor) -> Tensor:
    """Return gradients with zeros for groups without rows, which torch's kernel leaves unset.

    In compiled code the mask fuses with the cast of the gradient; otherwise a Triton kernel, if
    installed, writes only the empty groups, in place.
    """
    traced = torch.compiler.is_compiling() or isinstance(grad_EFD, FakeTensor)
    if not traced and grad_EFD.is_contiguous() and find_spec("triton") is not None:
        from allometry.models.grouped_cuda import zero_empty_groups_

        zero_empty_groups_(grad_EFD, offsets_E)
        return grad_EFD
    empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    return grad_EFD.masked_fill(empty_E[:, None, None], 0.0)
