"""Attention within packed documents on CUDA: variable-length flash kernels, for half types only."""

# T tokens, N query heads, K key/value heads, H head width

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from allometry.models.documents import Documents


def flash_attn_varlen(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Return causal attention within each document [T, N, H]: flash-attn's kernel."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_TNH, k_TKH, v_TKH, *_bounds(documents), softmax_scale=scale, causal=True
    )


def torch_varlen(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Return causal attention within each document [T, N, H]: torch's kernel."""
    from torch.nn.attention import varlen

    window, groups_heads = _spelling()
    more: dict[str, Any] = {"window_size": (-1, 0)} if window else {"is_causal": True}
    groups = q_TNH.shape[1] // k_TKH.shape[1]
    if groups > 1 and groups_heads:
        more["enable_gqa"] = True
    elif groups > 1:
        k_TKH, v_TKH = (x.repeat_interleave(groups, dim=1) for x in (k_TKH, v_TKH))
    return varlen.varlen_attn(q_TNH, k_TKH, v_TKH, *_bounds(documents), scale=scale, **more)


def _bounds(documents: Documents) -> tuple[Tensor, Tensor, int, int]:
    ends, longest = documents.cu_lengths, documents.max_length
    return ends, ends, longest, longest


@functools.cache
def torch_spelling() -> tuple[bool, bool]:
    """Return whether this version of torch takes a window for causal, and groups heads itself."""
    from torch.nn.attention import varlen

    names = inspect.signature(varlen.varlen_attn).parameters
    assert "window_size" in names or "is_causal" in names, names
    return "window_size" in names, "enable_gqa" in names


@torch.compiler.assume_constant_result  # torch's version does not change in a run
def _spelling() -> tuple[bool, bool]:
    return torch_spelling()  # cached behind this: the compiler would trace into a cache
