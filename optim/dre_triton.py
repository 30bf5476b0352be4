"""Triton kernels for ``dre.py``: bit-identical results, in one pass over memory.

One program processes several groups of 128. AdamW reads 16 bytes per element and writes 6
(parameter, gradient, two bytes of states; parameter, two bytes); fp32 moments are never stored in
memory. Codes are bytes, and rounding uses integers and the table, so FP8 hardware is not needed.
Powers only provide a guess of a code, which the table corrects, so results do not depend on the
precision of powers. A compiler may fuse products and sums of AdamW itself, so its values equal the
reference up to fp32 rounding.
"""

# W elements of a group, b groups of a program
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from allometry.optim.dre import (
    GOLDEN,
    GROUP,
    LARGEST,
    LOG2_RANGE,
    MIX,
    STEPS,
    Dither,
    Encoded,
    Table,
    num_groups,
)

_W: tl.constexpr = tl.constexpr(GROUP)
_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
_STEPS: tl.constexpr = tl.constexpr(STEPS)
_RANGE: tl.constexpr = tl.constexpr(STEPS * LOG2_RANGE)
_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_MIX_1: tl.constexpr = tl.constexpr(MIX[0])
_MIX_2: tl.constexpr = tl.constexpr(MIX[1])

PER_PROGRAM = 8
"""Groups that one program treats."""


def decode(encoded: Encoded, table: Table) -> Tensor:
    """Return the decoded values, fp32: ``dre.decode``."""
    out = torch.empty(encoded.q.shape, dtype=torch.float32, device=encoded.q.device)
    grid, sizes = _launch(encoded)
    if out.numel():
        _decode_kernel[grid](out, *_bytes(encoded), table.values, *sizes, PER_PROGRAM)
    return out


def encode(
    x: Tensor, to: Encoded, table: Table, dither: Dither | None = None, *, watch: bool = True
) -> Tensor | None:
    """Encode values into ``to``; return the sums of ``dre.encode`` [R, G, 4] if ``watch``."""
    grid, sizes = _launch(to)
    seen = _sums(to) if watch else None
    if x.numel():
        _encode_kernel[grid](
            x, *_bytes(to), *table, seen, *_keys(dither), *sizes, watch, PER_PROGRAM
        )
    return seen


def adamw(
    part: Tensor,
    gradient: Tensor,
    mean: Encoded,
    square: Encoded,
    table: Table,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    dithers: tuple[Dither, Dither] | tuple[None, None] = (None, None),
    watch: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Update a parameter's part in place: ``fp8_states.Fp8States.adamw``."""
    grid, sizes = _launch(mean)
    seen = (_sums(mean), _sums(square)) if watch else (None, None)
    if part.numel():
        _adamw_kernel[grid](
            *(part, gradient, *_bytes(mean), *_bytes(square), *table, *seen),
            *(*_keys(dithers[0]), *_keys(dithers[1])[2:]),
            *(1.0 - lr * weight_decay, lr, 1.0 - betas[0], betas[1], 1.0 - betas[1]),
            *(1.0 - betas[0] ** step, 1.0 - betas[1] ** step, eps),
            *sizes,
            watch,
            PER_PROGRAM,
        )
    return seen


def _launch(encoded: Encoded) -> tuple[tuple[int], tuple[int, int, int]]:
    """Return the grid, and (number of groups, groups in a row, columns)."""
    columns = encoded.q.shape[-1]
    groups = encoded.scale.numel()
    return (triton.cdiv(groups, PER_PROGRAM),), (groups, num_groups(columns), columns)


def _bytes(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    return encoded.q.view(torch.uint8), encoded.scale, encoded.exponent


def _sums(encoded: Encoded) -> Tensor:
    groups = num_groups(encoded.q.shape[-1])
    return torch.empty(encoded.scale.numel() // groups, groups, 4, device=encoded.q.device)


def _keys(dither: Dither | None) -> tuple[Any, ...]:
    """Return rows, first column and keys as kernel arguments."""
    return (None, 0, 0, 0) if dither is None else (dither.rows, dither.first_column, *dither.keys)


@triton.jit
def _places(groups, groups_in_row, columns, b: tl.constexpr):
    """Return a program's groups [b] and rows [b], and columns, addresses and mask [b, W]."""
    group_b = tl.program_id(0).to(tl.int64) * b + tl.arange(0, b)
    row_b = group_b // groups_in_row
    column_bW = ((group_b % groups_in_row) * _W)[:, None] + tl.arange(0, _W)[None, :]
    there_bW = (group_b < groups)[:, None] & (column_bW < columns)
    return group_b, row_b, column_bW, row_b[:, None] * columns + column_bW, there_bW


@triton.jit
def _read(q, scale, exponent, values, group_b, groups, at_bW, there_bW):
    code_bW = tl.load(q + at_bW, mask=there_bW, other=0).to(tl.int32)
    scale_b = tl.load(scale + group_b, mask=group_b < groups, other=0.0)
    exponent_b = tl.load(exponent + group_b, mask=group_b < groups, other=0).to(tl.int32)
    x_bW = tl.load(values + exponent_b[:, None] * 128 + (code_bW & 127)) * scale_b[:, None]
    return tl.where(code_bW > 127, -x_bW, x_bW)


@triton.jit
def _mixed(word):
    word = (word ^ (word >> 16)) * tl.full(word.shape, _MIX_1, tl.uint32)
    word = (word ^ (word >> 15)) * tl.full(word.shape, _MIX_2, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def _random(rows, first_column, key_1, key_2, row_b, column_bW, inside_b):
    row_b = tl.load(rows + row_b, mask=inside_b, other=0).to(tl.uint32)
    row_b = _mixed((row_b.to(tl.int64) ^ key_1).to(tl.uint32))
    row_b = _mixed((row_b.to(tl.int64) ^ key_2).to(tl.uint32))
    column_bW = (column_bW + first_column).to(tl.uint32)
    word_bW = row_b[:, None] + column_bW * tl.full(column_bW.shape, _GOLDEN, tl.uint32)
    return (_mixed(word_bW) >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _exponent(scale_b, least_b, had_b, ranges, kept_ranges):
    """Return 16k: a guess corrected by the table, or the previous value; 255 for ratios below 2."""
    ratio_b = tl.div_rn(scale_b, least_b)
    guess_b = tl.minimum(_RANGE / tl.log2(tl.maximum(ratio_b, 1.5)), 255.0)
    code_b = tl.minimum(tl.maximum(tl.maximum(guess_b, 1.0).to(tl.int32), 1), 255)
    more_b = tl.load(ranges + tl.maximum(254 - code_b, 0)) >= ratio_b
    code_b = tl.where((code_b < 255) & more_b, code_b + 1, code_b)
    less_b = tl.load(ranges + (255 - code_b)) < ratio_b
    code_b = tl.where((code_b > 1) & less_b, code_b - 1, code_b)
    stays_b = (ratio_b <= tl.load(kept_ranges + had_b)) & (had_b * 16 >= code_b * 15 - 16)
    code_b = tl.where(stays_b, had_b, code_b)
    return tl.where(scale_b == 0.0, 0, code_b)


@triton.jit
def _guess(share_bW, power_b):
    """Return codes for fractions of the largest magnitude, at most one code off."""
    y_bW = tl.exp2(power_b[:, None] * tl.log2(tl.where(share_bW > 0.0, share_bW, 1.0))) * 448.0
    y_bW = tl.where(share_bW > 0.0, tl.minimum(y_bW, 448.0), 0.0)
    normal_bW = ((y_bW.to(tl.int32, bitcast=True) + 0x80000) >> 20) - 960
    code_bW = tl.where(y_bW < 0.015625, (y_bW * 512.0 + 0.5).to(tl.int32), normal_bW)
    return tl.minimum(tl.maximum(code_bW, 0), _LARGEST)


@triton.jit
def _write(
    x_bW, q, scale, exponent, values, ranges, kept_ranges, seen, rows, first_column, key_1, key_2,
    group_b, groups, row_b, column_bW, at_bW, there_bW, WATCH: tl.constexpr,
):  # fmt: skip
    """Encode the groups of a program, as ``dre.encode_rows`` does."""
    inside_b = group_b < groups
    size_bW = tl.where(there_bW, tl.abs(x_bW), 0.0)
    scale_b = tl.max(size_bW, 1)
    number_b = tl.min((size_bW == size_bW).to(tl.int32), 1) == 1  # a maximum may ignore NaN
    scale_b = tl.where(number_b, scale_b, float("nan"))
    least_b = tl.min(tl.where(size_bW > 0.0, size_bW, float("inf")), 1)
    had_b = tl.load(exponent + group_b, mask=inside_b, other=0).to(tl.int32)
    exponent_b = _exponent(scale_b, least_b, had_b, ranges, kept_ranges)
    share_bW = tl.div_rn(size_bW, tl.where(scale_b == 0.0, 1.0, scale_b)[:, None])
    code_bW = _guess(share_bW, exponent_b.to(tl.float32) / _STEPS)
    first_bW = values + exponent_b[:, None] * 128
    code_bW -= (tl.load(first_bW + code_bW) > share_bW).to(tl.int32)
    code_bW = tl.minimum(tl.maximum(code_bW, 0), _LARGEST - 1)
    below_bW = tl.load(first_bW + code_bW)
    above_bW = tl.load(first_bW + code_bW + 1)
    if rows is not None:
        random_bW = _random(rows, first_column, key_1, key_2, row_b, column_bW, inside_b)
        up_bW = random_bW * (above_bW - below_bW) < share_bW - below_bW
    else:
        up_bW = share_bW - below_bW > above_bW - share_bW
    code_bW += up_bW.to(tl.int32)
    signed_bW = tl.where(x_bW < 0.0, code_bW + 128, code_bW)
    tl.store(q + at_bW, signed_bW.to(tl.uint8), mask=there_bW)
    tl.store(scale + group_b, scale_b, mask=inside_b)
    tl.store(exponent + group_b, exponent_b.to(tl.uint8), mask=inside_b)
    if WATCH:
        error_bW = share_bW - tl.where(up_bW, above_bW, below_bW)
        lost_bW = ((code_bW == 0) & (size_bW > 0.0)).to(tl.float32)
        most_bW = ((code_bW == _LARGEST) & there_bW).to(tl.float32)
        tl.store(seen + group_b * 4, tl.sum(error_bW * error_bW, 1), mask=inside_b)
        tl.store(seen + group_b * 4 + 1, tl.sum(share_bW * share_bW, 1), mask=inside_b)
        tl.store(seen + group_b * 4 + 2, tl.sum(lost_bW, 1), mask=inside_b)
        tl.store(seen + group_b * 4 + 3, tl.sum(most_bW, 1), mask=inside_b)


@triton.jit
def _decode_kernel(
    out, q, scale, exponent, values, groups, groups_in_row, columns, b: tl.constexpr
):
    group_b, _row_b, _column_bW, at_bW, there_bW = _places(groups, groups_in_row, columns, b)
    x_bW = _read(q, scale, exponent, values, group_b, groups, at_bW, there_bW)
    tl.store(out + at_bW, x_bW, mask=there_bW)


@triton.jit
def _encode_kernel(
    x, q, scale, exponent, values, ranges, kept_ranges, seen, rows, first_column, key_1, key_2,
    groups, groups_in_row, columns, WATCH: tl.constexpr, b: tl.constexpr,
):  # fmt: skip
    group_b, row_b, column_bW, at_bW, there_bW = _places(groups, groups_in_row, columns, b)
    x_bW = tl.load(x + at_bW, mask=there_bW, other=0.0)
    _write(
        x_bW, q, scale, exponent, values, ranges, kept_ranges, seen,
        rows, first_column, key_1, key_2,
        group_b, groups, row_b, column_bW, at_bW, there_bW, WATCH,
    )  # fmt: skip


@triton.jit
def _adamw_kernel(
    part, gradient, m_q, m_scale, m_exponent, v_q, v_scale, v_exponent, values, ranges, kept_ranges,
    m_seen, v_seen, rows, first_column, m_key_1, m_key_2, v_key_1, v_key_2,
    keep, lr, new_1, beta_2, new_2, correction_1, correction_2, eps,
    groups, groups_in_row, columns, WATCH: tl.constexpr, b: tl.constexpr,
):  # fmt: skip
    group_b, row_b, column_bW, at_bW, there_bW = _places(groups, groups_in_row, columns, b)
    g_bW = tl.load(gradient + at_bW, mask=there_bW, other=0.0)
    m_bW = _read(m_q, m_scale, m_exponent, values, group_b, groups, at_bW, there_bW)
    v_bW = _read(v_q, v_scale, v_exponent, values, group_b, groups, at_bW, there_bW)
    m_bW = m_bW + new_1 * (g_bW - m_bW)
    v_bW = v_bW * beta_2 + new_2 * g_bW * g_bW
    root_bW = tl.sqrt_rn(v_bW / correction_2) + eps
    direction_bW = m_bW / correction_1 / root_bW
    p_bW = tl.load(part + at_bW, mask=there_bW, other=0.0)
    tl.store(part + at_bW, p_bW * keep - lr * direction_bW, mask=there_bW)
    _write(
        m_bW, m_q, m_scale, m_exponent, values, ranges, kept_ranges, m_seen,
        rows, first_column, m_key_1, m_key_2,
        group_b, groups, row_b, column_bW, at_bW, there_bW, WATCH,
    )  # fmt: skip
    _write(
        v_bW, v_q, v_scale, v_exponent, values, ranges, kept_ranges, v_seen,
        rows, first_column, v_key_1, v_key_2,
        group_b, groups, row_b, column_bW, at_bW, there_bW, WATCH,
    )  # fmt: skip
