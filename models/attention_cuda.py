"""Attention within packed documents on CUDA: a variable-length flash kernel.

flash-attn's where it is installed, else torch's own. Both take half types only.
"""

# T tokens, N query heads, K key/value heads, H head width

from __future__ import annotations

import functools
import importlib.util
import inspect
from enum import StrEnum

import torch
from torch import Tensor


class VarlenKernel(StrEnum):
    """The variable-length kernels there are, and how each spells causal attention."""

    FLASH_ATTN = "flash_attn"
    TORCH_WINDOW = "torch: window_size=(-1, 0)"
    TORCH_IS_CAUSAL = "torch: is_causal=True"


# Compiled code takes the answer as a constant: what is installed does not change in a run.
@torch.compiler.assume_constant_result
@functools.cache
def varlen_kernel() -> VarlenKernel:
    """Say which kernel is used here. torch spells causal differently from version to version."""
    if importlib.util.find_spec("flash_attn") is not None:
        return VarlenKernel.FLASH_ATTN
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    if "window_size" in names:
        return VarlenKernel.TORCH_WINDOW
    assert "is_causal" in names, names
    return VarlenKernel.TORCH_IS_CAUSAL


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_lengths: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    """Return causal attention within each document [T, N, H]; bf16 or fp16, on CUDA."""
    kernel = varlen_kernel()
    if kernel == VarlenKernel.FLASH_ATTN:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_TNH,
            k_TKH,
            v_TKH,
            cu_lengths,
            cu_lengths,
            max_length,
            max_length,
            softmax_scale=scale,
            causal=True,
        )
    from torch.nn.attention.varlen import varlen_attn

    groups = q_TNH.shape[1] // k_TKH.shape[1]
    if groups > 1:  # not every supported torch groups heads here
        k_TKH, v_TKH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    lengths = (cu_lengths, cu_lengths, max_length, max_length)
    if kernel == VarlenKernel.TORCH_WINDOW:
        return varlen_attn(q_TNH, k_TKH, v_TKH, *lengths, scale=scale, window_size=(-1, 0))
    return varlen_attn(q_TNH, k_TKH, v_TKH, *lengths, scale=scale, is_causal=True)
