"""Rounding to FP8 with the selected kernels: torch operators, or Triton kernels in one pass."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from allometry.models import fp8


def kernels(fused: bool) -> Any | None:
    """Return ``fp8_triton``, or None to use torch operators: not ``fused``, or under compile."""
    if not fused or torch.compiler.is_compiling():
        return None
    from allometry.models import fp8_triton

    module: ModuleType = fp8_triton
    return module


def quantise(
    x: Tensor,
    block: fp8.Block,
    dtype: torch.dtype = fp8.E4M3,
    scale_dtype: torch.dtype = torch.float32,
    *,
    fused: bool,
) -> fp8.Quantised:
    """Return ``fp8.quantise``; if ``fused``, Triton kernels round rows in one pass, bit-equal."""
    own = kernels(fused)
    if own is not None and own.takes(x, block):
        made: fp8.Quantised = own.quantise(x, block, dtype, scale_dtype)
        return made
    return fp8.quantise(x, block, dtype, scale_dtype)


def save(x: Tensor, *, fused: bool) -> fp8.Quantised:
    """Return ``fp8.save``; if ``fused``, computed in one pass."""
    rows = x.reshape(-1, x.shape[-1])
    return quantise(rows, fp8.SAVED, scale_dtype=torch.bfloat16, fused=fused)
