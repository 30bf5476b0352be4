"""Triton kernel that complements torch's grouped product on a GPU (``grouped.py``)."""

# E groups, S rows sorted by group

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def zero_empty_groups_(y_EFD: Tensor, offsets_E: Tensor) -> None:
    """Set the matrices of groups without rows to zero, in place; other matrices are not read.

    ``offsets_E``: the end of each group's rows. The reference is ``masked_fill``, which reads and
    writes all groups.
    """
    assert y_EFD.is_contiguous(), y_EFD.stride()
    groups, size = y_EFD.shape[0], y_EFD[0].numel()
    grid = (groups, triton.cdiv(size, _BLOCK))
    _zero_empty_groups[grid](y_EFD, offsets_E, size, _BLOCK)


@triton.jit
def _zero_empty_groups(y, offsets, size, BLOCK: tl.constexpr):
    group = tl.program_id(0)
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    if tl.load(offsets + group) == start:
        places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), dtype=y.dtype.element_ty)
        tl.store(y + group.to(tl.int64) * size + places, zeros, mask=places < size)
