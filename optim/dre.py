"""FP8 numbers with dynamic range expansion: the format of compressed optimizer states.

COAT (arXiv 2410.19313, section 4.2) stretches the values of a group over the full range of E4M3
with a power k before rounding. A group is 128 consecutive elements of a row (fewer at its end), and
is stored as signed E4M3 magnitudes q with a scale M, its largest magnitude, and k:

    x = ± M (q/448)^(1/k)

The paper and its kernel write the same map with a centre c and a scale s, y = (x/c)^k / s with s =
(M/c)^k / 448, from which c cancels. M is fp32, so that a group with zero gradients decays with its
averages; a narrower M would stop changing once a step changes it by less than its last bit. k is
the largest multiple of 1/16 (at most 255/16) for which the smallest nonzero magnitude stays in the
range of the format. A group keeps its k while it is within 1/16 of this value: a new k moves every
value, and slowly changing averages would accumulate an error at each step. One byte for q, and four
for M and one for k per 128 elements, give 1.04 bytes per element.

Values of the format are read from a table, and rounding only compares fp32 numbers with the table:
the bits are the same on every device and for every position of an element. All-zero bytes decode to
zeros. A group with a number that is not finite decodes to numbers that are not finite, never to
448.
"""

# R rows, C columns, G groups in a row, W elements of a group, V codes

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from allometry.scaling.update_rules import FP8_GROUP

GROUP = FP8_GROUP
"""Elements of a row that share a scale and an exponent."""

STEPS = 16
"""Denominator of exponents: k is a multiple of 1/STEPS."""

LARGEST = 126
"""Code of 448, the largest magnitude of E4M3; codes are ordered like their values."""

LOG2_RANGE = math.log2(448.0**2 / 2.0)
"""Upper bound of k log2(M/least), as in COAT's kernel: the smallest magnitude maps to 2.3 times the
smallest magnitude of E4M3.
"""

LOG2_KEPT_RANGE = math.log2(448.0 / (1.5 * 2.0**-9))
"""Upper bound for keeping k: the smallest magnitude rounds to E4M3's second smallest or more."""

_CHUNK = 1 << 16  # elements with temporary copies at one time


class Table(NamedTuple):
    """Lookup tables of the format.

    ``values`` [256, 128]: (q/448)^(1/k) by 16k and code, fp32; row 0 is zeros and code 127 is
    unused. ``ranges`` [256]: largest M/least that allows 16k = 255, 254, ... 1, 0, ascending.
    ``kept_ranges`` [256]: largest M/least that allows keeping 16k = 0, 1, ... 255.
    """

    values: Tensor
    ranges: Tensor
    kept_ranges: Tensor

    @classmethod
    def on(cls, device: torch.device) -> Table:
        """Return the table on ``device``; computed on a CPU, so the same bits on all devices."""
        codes = torch.arange(LARGEST + 1, dtype=torch.uint8, device="cpu")
        share = codes.view(torch.float8_e4m3fn).double() / 448.0
        exponents = torch.arange(256, dtype=torch.float64, device="cpu").clamp(min=1.0) / STEPS
        values = F.pad(share.log2() / exponents[:, None], (0, 1), value=-math.inf).exp2()
        values[0] = 0.0
        ranges, kept = (torch.exp2(limit / exponents) for limit in (LOG2_RANGE, LOG2_KEPT_RANGE))
        kept[0] = 0.0
        tables = values, ranges.flip(0).contiguous(), kept
        return cls(*(table.float().to(device) for table in tables))


class Encoded(NamedTuple):
    """Part [..., C] of a tensor: ``q`` E4M3, ``scale`` fp32 and ``exponent`` uint8 [..., G]."""

    q: Tensor
    scale: Tensor
    exponent: Tensor

    @classmethod
    def zeros(cls, shape: tuple[int, ...], device: torch.device) -> Encoded:
        """Return zeros of a shape with at least two dimensions."""
        groups = (*shape[:-1], num_groups(shape[-1]))
        return cls(
            torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn),
            torch.zeros(groups, dtype=torch.float32, device=device),
            torch.zeros(groups, dtype=torch.uint8, device=device),
        )

    def rows(self) -> Iterator[tuple[slice, Encoded]]:
        """Yield chunks of rows over all leading dimensions, as views [r, ...]."""
        columns = self.q.shape[-1]
        flat = Encoded(*(each.view(-1, each.shape[-1]) if columns else each for each in self))
        # For fake tensors of a dry run, one chunk costs as much as all rows.
        fake = isinstance(self.q, FakeTensor)
        together = max(1, len(flat.q) if fake else _CHUNK // max(1, columns))
        for start in range(0, len(flat.q) if columns else 0, together):
            rows = slice(start, start + together)
            yield rows, Encoded(*(each[rows] for each in flat))


@dataclass(frozen=True)
class Dither:
    """Random numbers that depend only on two keys and the position in the unsharded tensor.

    ``rows``: index of each local row in the tensor, int64 [R]; ``first_column``: index of the first
    local column.
    """

    keys: tuple[int, int]
    rows: Tensor
    first_column: int

    def of(self, rows: slice, columns: int) -> Tensor:
        """Return fp32 numbers in [0, 1) for ``columns`` columns of some rows."""
        row_R = _mixed(_mixed(self.rows[rows] ^ self.keys[0]) ^ self.keys[1])
        column_C = torch.arange(columns, device=row_R.device) + self.first_column
        bits_RC = _mixed((row_R[:, None] + column_C * GOLDEN) & _WORD)
        return (bits_RC >> 8).float() * 2.0**-24


GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio, the spacing of splitmix's counters
_WORD = 0xFFFFFFFF
MIX = (0x7FEB352D, 0x846CA68B)
"""Multipliers of a 32-bit hash (C. Wellons, "lowbias32", nullprogram.com/blog/2018/07/31)."""


def _mixed(word: Tensor) -> Tensor:
    """Return hashed 32-bit words, stored in int64."""
    word = ((word ^ (word >> 16)) * MIX[0]) & _WORD
    word = ((word ^ (word >> 15)) * MIX[1]) & _WORD
    return word ^ (word >> 16)


def num_groups(columns: int) -> int:
    """Return the number of groups in a row; for example, 300 columns have 3 groups."""
    return -(-columns // GROUP)


def decode(encoded: Encoded, table: Table) -> Tensor:
    """Return the decoded values, fp32."""
    out = torch.empty(encoded.q.shape, dtype=torch.float32, device=encoded.q.device)
    flat = out.view(-1, out.shape[-1]) if out.numel() else out
    for rows, part in encoded.rows():
        flat[rows] = decode_rows(part, table)
    return out


def decode_rows(part: Encoded, table: Table) -> Tensor:
    """Return the decoded values of some rows, fp32 [R, C]."""
    codes_RC = part.q.view(torch.uint8)
    columns = codes_RC.shape[1]
    values_RGV = table.values[part.exponent.long()]
    x_RGW = values_RGV.gather(2, _grouped(codes_RC & 127).long()).mul_(part.scale[..., None])
    x_RC = x_RGW.flatten(1)[:, :columns]
    return torch.where(codes_RC > 127, -x_RC, x_RC)


def encode(x: Tensor, to: Encoded, table: Table, dither: Dither | None = None) -> Tensor:
    """Encode fp32 values [..., C] into ``to``, which contains the state before this step.

    Returns the sums of ``encode_rows``, [R, G, 4].
    """
    flat = x.view(-1, x.shape[-1]) if x.numel() else x
    seen = [encode_rows(flat[rows], part, table, rows, dither) for rows, part in to.rows()]
    return torch.cat(seen) if seen else x.new_zeros(0, num_groups(x.shape[-1]), 4)


def encode_rows(
    x_RC: Tensor, to: Encoded, table: Table, rows: slice, dither: Dither | None = None
) -> Tensor:
    """Encode some rows into ``to``, rounded to nearest or, with ``dither``, stochastically.

    Stochastic rounding is unbiased. Returns sums over each group, fp32 [R, G, 4]: squared errors
    and squared values, both over M²; number of values that became zero; number of values with the
    largest code.
    """
    columns = x_RC.shape[1]
    x_RGW = _grouped(x_RC)
    size_RGW = x_RGW.abs()
    scale_RG = size_RGW.amax(2)
    least_RG = torch.where(size_RGW > 0.0, size_RGW, math.inf).amin(2)
    exponent_RG = _exponents(scale_RG, scale_RG / least_RG, to.exponent.long(), table)
    # For a group of zeros the quotient is NaN.
    share_RGW = torch.where(scale_RG[..., None] == 0.0, 0.0, size_RGW / scale_RG[..., None])
    power_RG1 = exponent_RG[..., None].clamp(min=1).float() / STEPS
    # The guess is at most one code off; the table gives the exact code.
    guess_RGW = share_RGW.pow(power_RG1).mul_(448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    values_RGV = table.values[exponent_RG]
    code_RGW = guess_RGW.long().clamp_(max=LARGEST)
    code_RGW -= (values_RGV.gather(2, code_RGW) > share_RGW).long()
    code_RGW.clamp_(0, LARGEST - 1)
    below_RGW = values_RGV.gather(2, code_RGW)
    above_RGW = values_RGV.gather(2, code_RGW + 1)
    rest_RGW, step_RGW = share_RGW - below_RGW, above_RGW - below_RGW
    if dither is None:
        up_RGW = rest_RGW > above_RGW - share_RGW
    else:
        up_RGW = _grouped(dither.of(rows, columns)) * step_RGW < rest_RGW
    # Codes of groups that are not finite are arbitrary: their scale is not finite.
    code_RGW = (code_RGW + up_RGW).to(torch.uint8)
    signed_RGW = torch.where(x_RGW < 0.0, code_RGW + 128, code_RGW)
    to.q.view(torch.uint8).copy_(signed_RGW.flatten(1)[:, :columns])
    to.scale.copy_(scale_RG)
    to.exponent.copy_(exponent_RG)
    error_RGW = share_RGW - torch.where(up_RGW, above_RGW, below_RGW)
    lost_RGW = (code_RGW == 0) & (size_RGW > 0.0)
    sums = error_RGW.square().sum(2), share_RGW.square().sum(2)
    counts = lost_RGW.sum(2), (code_RGW == LARGEST).sum(2)
    return torch.stack([*sums, *(count.float() for count in counts)], 2)


def _exponents(scale_RG: Tensor, ratio_RG: Tensor, had_RG: Tensor, table: Table) -> Tensor:
    """Return 16k of groups, given the ratio of the largest to the smallest magnitude."""
    best_RG = 255 - torch.searchsorted(table.ranges, ratio_RG).clamp(max=254)
    stays_RG = (ratio_RG <= table.kept_ranges[had_RG]) & (had_RG * 16 >= best_RG * 15 - 16)
    return torch.where(scale_RG == 0.0, 0, torch.where(stays_RG, had_RG, best_RG))


def _grouped(x_RC: Tensor) -> Tensor:
    """Return rows as [R, G, 128], padded with zeros."""
    rows, columns = x_RC.shape
    groups = num_groups(columns)
    return F.pad(x_RC, (0, groups * GROUP - columns)).view(rows, groups, GROUP)
