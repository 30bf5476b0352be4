"""Triton kernels that round rows to FP8 in one pass: alone, after RMSNorm, and after SwiGLU.

A program handles one row. Torch's operators read and write an activation some ten times to find
the largest magnitudes, divide, clamp and cast. After a norm or SwiGLU, these kernels read the input
once and write the FP8 copy for backward, the result, and the result in FP8 for the next product.
FP8 codes are computed with integer arithmetic, so they do not depend on a device's casts; for equal
inputs they are bitwise equal to ``fp8.quantise``, the reference. The sum in a norm has its own
order. Compiled models do not use these kernels: torch.compile fuses the same passes.
"""

# M rows, K columns, G groups of W numbers in a row
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allometry.models import fp8

LARGEST_ROW = 16384
"""Largest number of columns that a program keeps in registers; torch rounds wider rows."""

_TYPES = (torch.bfloat16, torch.float32)
_SAVED: tl.constexpr = tl.constexpr(fp8.SAVED[1])


class Normed(NamedTuple):
    """Output of ``norm`` for x [.., K]: result, tensors for backward, result in FP8."""

    y: Tensor
    scale: Tensor  # reciprocal root mean square [.., 1], fp32
    saved: fp8.Quantised
    small: fp8.Quantised | None


class Gated(NamedTuple):
    """Output of ``swiglu`` for [.., 2F]: result, tensors for backward, result in FP8."""

    h: Tensor
    saved: fp8.Quantised
    small: fp8.Quantised | None


def takes(x: Tensor, block: fp8.Block) -> bool:
    """Return True if a kernel supports x with such blocks: complete rows, or 16 or 128 columns."""
    known = x.dtype in _TYPES and 0 < x.shape[-1] <= LARGEST_ROW
    return known and block[0] == 1 and block[1] in (None, 16, 128)


def quantise(
    x: Tensor, block: fp8.Block, dtype: torch.dtype, scale_dtype: torch.dtype
) -> fp8.Quantised:
    """Return ``fp8.quantise`` of a tensor for which ``takes`` is True."""
    x = x.contiguous()
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    made = _room(x, block, dtype, scale_dtype)
    if rows:
        _quantise[(rows,)](
            x, *_bytes(made), columns, **_how(columns, block, dtype, scale_dtype),
            num_warps=_warps(columns),
        )  # fmt: skip
    return made


def norm(x: Tensor, weight: Tensor, eps: float, block: fp8.Block | None) -> Normed:
    """Compute RMSNorm; ``block``: block of the FP8 copy of the result, None for no copy.

    With ``fp8.SAVED`` the copy's scales are bf16, as in the tensors for backward, else fp32.
    """
    x, columns = x.contiguous(), x.shape[-1]
    rows = x.numel() // columns
    y, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    saved, small, how = _saved_and_small(x, columns, block)
    if rows:
        _norm[(rows,)](
            x, weight.contiguous(), y, scale, *_bytes(saved), *_bytes(small), columns, eps, **how,
            num_warps=_warps(columns),
        )  # fmt: skip
    return Normed(y, scale, saved, small)


def swiglu(gate_up: Tensor, block: fp8.Block | None) -> Gated:
    """Compute SwiGLU of [.., 2F], F a multiple of 16; ``block`` as in ``norm``."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
    assert width % fp8.SAVED[1] == 0, width  # type: ignore[operator]
    rows = gate_up.numel() // (2 * width)
    h = gate_up.new_empty(*gate_up.shape[:-1], width)
    saved, _, _ = _saved_and_small(gate_up, 2 * width, None)
    _, small, how = _saved_and_small(h, width, block)
    if rows:
        _swiglu[(rows,)](
            gate_up, h, *_bytes(saved), *_bytes(small), width, **how, num_warps=_warps(width)
        )
    return Gated(h, saved, small)


def _room(
    x: Tensor, block: fp8.Block, dtype: torch.dtype, scale_dtype: torch.dtype
) -> fp8.Quantised:
    groups = -(-x.shape[-1] // (block[1] or x.shape[-1]))
    scales = x.new_empty(*x.shape[:-1], groups, dtype=scale_dtype)
    return fp8.Quantised(torch.empty(x.shape, dtype=dtype, device=x.device), scales)


def _saved_and_small(
    x: Tensor, columns: int, block: fp8.Block | None
) -> tuple[fp8.Quantised, fp8.Quantised | None, dict[str, Any]]:
    rows_MK = x.view(-1, columns)
    saved = _room(rows_MK, fp8.SAVED, fp8.E4M3, torch.bfloat16)
    scale_dtype = torch.bfloat16 if block == fp8.SAVED else torch.float32
    how = _how(columns, block or fp8.SAVED, fp8.E4M3, scale_dtype)
    del how["E5M2"]
    if block is None:
        return saved, None, how
    return saved, _room(rows_MK, block, fp8.E4M3, scale_dtype), how


def _how(
    columns: int, block: fp8.Block, dtype: torch.dtype, scale_dtype: torch.dtype
) -> dict[str, Any]:
    size = max(triton.next_power_of_2(columns), 128)
    group = block[1] or size
    return {
        "GROUPS": size // group,
        "W": group,
        "E5M2": dtype == fp8.E5M2,
        "HALF": scale_dtype == torch.bfloat16,
    }


def _bytes(made: fp8.Quantised | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if made is None else (made.values.view(torch.uint8), made.scales)


def _warps(columns: int) -> int:
    return min(max(triton.next_power_of_2(columns) // 512, 1), 16)


@triton.jit
def _columns(GROUPS: tl.constexpr, W: tl.constexpr):
    return tl.arange(0, GROUPS)[:, None] * W + tl.arange(0, W)[None, :]


@triton.jit
def _as_bf16(x):
    """Return fp32 numbers rounded to bf16, to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def _as(x, y):
    """Return fp32 numbers rounded to the element type of ``y``: bf16, or unchanged for fp32."""
    return _as_bf16(x) if y.dtype.element_ty == tl.bfloat16 else x


@triton.jit
def _codes(x, E5M2: tl.constexpr):
    """Return the FP8 bytes of numbers within the type's range, to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    least: tl.constexpr = 0x38800000 if E5M2 else 0x3C800000  # the smallest normal, 2^-14 or 2^-6
    shift: tl.constexpr = 21 if E5M2 else 20
    half: tl.constexpr = 0xFFFFF if E5M2 else 0x7FFFF
    first: tl.constexpr = 448 if E5M2 else 960
    magic: tl.constexpr = 128.0 if E5M2 else 16384.0
    normal = ((size + half + ((size >> shift) & 1)) >> shift) - first
    tiny = size.to(tl.float32, bitcast=True) + magic  # subnormals are evenly spaced
    code = tl.where(size < least, tiny.to(tl.int32, bitcast=True) & 15, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _write(x_GW, values, scales, row, columns, E5M2: tl.constexpr, HALF: tl.constexpr):
    """Write a row [G, W] in FP8, each group with the scale of its largest magnitude."""
    at_GW = _columns(x_GW.shape[0], x_GW.shape[1])
    there_GW = at_GW < columns
    group_G = tl.arange(0, x_GW.shape[0])
    largest: tl.constexpr = 57344.0 if E5M2 else 448.0
    size_GW = tl.where(there_GW, tl.abs(x_GW), 0.0)
    number_G = tl.min((size_GW == size_GW).to(tl.int32), 1) == 1  # tl.max may ignore NaN
    scale_G = tl.maximum(tl.div_rn(tl.max(size_GW, 1), largest), 1.1754943508222875e-38)
    scale_G = tl.where(number_G, scale_G, float("nan"))
    if HALF:
        scale_G = _as_bf16(scale_G)
    y_GW = tl.div_rn(x_GW, tl.broadcast_to(scale_G[:, None], x_GW.shape))
    y_GW = tl.where(y_GW > largest, largest, tl.where(y_GW < -largest, -largest, y_GW))
    number = (columns + x_GW.shape[1] - 1) // x_GW.shape[1]
    tl.store(values + row * columns + at_GW, _codes(y_GW, E5M2), mask=there_GW)
    kept_G = scale_G.to(scales.dtype.element_ty)
    tl.store(scales + row * number + group_G, kept_G, mask=group_G < number)


@triton.jit
def _quantise(
    x, values, scales, columns, GROUPS: tl.constexpr, W: tl.constexpr, E5M2: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at_GW = _columns(GROUPS, W)
    x_GW = tl.load(x + row * columns + at_GW, mask=at_GW < columns, other=0.0).to(tl.float32)
    _write(x_GW, values, scales, row, columns, E5M2, HALF)


@triton.jit
def _norm(
    x, weight, y, scale, saved_values, saved_scales, values, scales, columns, eps,
    GROUPS: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = _columns(GROUPS * W // _SAVED, _SAVED)
    x_row = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    _write(x_row, saved_values, saved_scales, row, columns, False, True)
    square = tl.sum(tl.sum(x_row * x_row, 1), 0) / columns
    root = tl.div_rn(1.0, tl.sqrt_rn(square + eps))
    tl.store(scale + row, root)
    weight_row = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    y_row = _as(x_row * root * weight_row, y)
    tl.store(y + row * columns + at, y_row.to(y.dtype.element_ty), mask=at < columns)
    if values is not None:
        _write(tl.reshape(y_row, (GROUPS, W)), values, scales, row, columns, False, HALF)


@triton.jit
def _swiglu(
    gate_up, h, saved_values, saved_scales, values, scales, width,
    GROUPS: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = _columns(GROUPS * W // _SAVED, _SAVED)
    there = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=there, other=0.0).to(tl.float32)
    _write(gate, saved_values, saved_scales, 2 * row, width, False, True)
    _write(up, saved_values, saved_scales, 2 * row + 1, width, False, True)
    silu = _as(tl.div_rn(gate, 1.0 + tl.exp(-gate)), h)
    h_row = _as(silu * up, h)
    tl.store(h + row * width + at, h_row.to(h.dtype.element_ty), mask=there)
    if values is not None:
        _write(tl.reshape(h_row, (GROUPS, W)), values, scales, row, width, False, HALF)
