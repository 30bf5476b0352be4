"""Attention within packed documents on CUDA: a variable-length flash kernel.

flash-attn's where it is installed, else torch's own. Both take half types only.
"""

# T tokens, N query heads, K key/value heads, H head width

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import NamedTuple

import torch
from torch import Tensor


class VarlenOptions(NamedTuple):
    """Which kernel there is and how it spells what is asked of it."""

    flash_attn: bool
    window: bool
    groups_heads: bool


@functools.cache
def varlen_options() -> VarlenOptions:
    """Look at what is installed: torch spells causal differently from version to version."""
    if importlib.util.find_spec("flash_attn") is not None:
        return VarlenOptions(flash_attn=True, window=False, groups_heads=True)
    from torch.nn.attention import varlen

    names = inspect.signature(varlen.varlen_attn).parameters
    window = "window_size" in names
    assert window or "is_causal" in names, names
    return VarlenOptions(flash_attn=False, window=window, groups_heads="enable_gqa" in names)


@torch.compiler.assume_constant_result  # what is installed does not change in a run
def _options() -> VarlenOptions:
    return varlen_options()  # cached behind this: the compiler would trace into a cache


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_lengths: Tensor,
    max_length: int,
    scale: float,
) -> Tensor:
    """Return causal attention within each document [T, N, H]; bf16 or fp16, on CUDA."""
    options = _options()
    lengths = (cu_lengths, cu_lengths, max_length, max_length)
    if options.flash_attn:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q_TNH, k_TKH, v_TKH, *lengths, softmax_scale=scale, causal=True
        )
    from torch.nn.attention import varlen

    groups = q_TNH.shape[1] // k_TKH.shape[1]
    more = {"window_size": (-1, 0)} if options.window else {"is_causal": True}
    if groups > 1 and options.groups_heads:
        more["enable_gqa"] = True
    elif groups > 1:
        k_TKH, v_TKH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    return varlen.varlen_attn(q_TNH, k_TKH, v_TKH, *lengths, scale=scale, **more)
