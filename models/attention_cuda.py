"""Attention by CUDA kernels of torch, cuDNN and flash-attn; only for half types."""

# B sequences, L tokens in a sequence, T = B*L, N query heads, K key/value heads, H head width

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allometry.models.documents import Documents


def flash_attn_2(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return causal attention within each document [B, L, N, H], by flash-attn's kernels."""
    import flash_attn

    functions = (flash_attn.flash_attn_func, flash_attn.flash_attn_varlen_func)
    return _package(functions, q_BLNH, k_BLKH, v_BLKH, documents, scale, window)


def flash_attn_3(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Return causal attention [B, L, N, H] by flash-attn's Hopper kernels (arXiv 2407.08608)."""
    import flash_attn_interface

    functions = (
        flash_attn_interface.flash_attn_func,
        flash_attn_interface.flash_attn_varlen_func,
    )
    return _package(functions, q_BLNH, k_BLKH, v_BLKH, documents, scale, window)


def _package(
    functions: tuple[Callable[..., Any], Callable[..., Any]],
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None,
) -> Tensor:
    whole, varlen = functions
    # Without ``deterministic`` the backward sums query gradients by atomics, in any order.
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if window is not None:
        options["window_size"] = (window - 1, 0)  # keys before the query's position, and after
    if documents is None:
        o_BLNH = whole(q_BLNH, k_BLKH, v_BLKH, **options)
    else:
        q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLKH, v_BLKH))
        o_BLNH = varlen(q, k, v, *_bounds(documents), **options)
    # Early versions for Hopper also return the log-sum-exp.
    o_BLNH = o_BLNH[0] if isinstance(o_BLNH, tuple) else o_BLNH
    return o_BLNH.view(q_BLNH.shape)


def torch_varlen(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, documents: Documents, scale: float
) -> Tensor:
    """Return causal attention within each document [T, N, H], by torch's varlen kernel."""
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
    """Return whether this torch's varlen_attn has ``window_size``, and has ``enable_gqa``."""
    from torch.nn.attention import varlen

    names = inspect.signature(varlen.varlen_attn).parameters
    assert "window_size" in names or "is_causal" in names, names
    return "window_size" in names, "enable_gqa" in names


@torch.compiler.assume_constant_result  # torch's version does not change in a run
def _spelling() -> tuple[bool, bool]:
    return torch_spelling()  # cached one level down: the compiler would trace into the cache


def flash(q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, scale: float) -> Tensor:
    """Return causal attention [B, N, L, H] by torch's flash kernel, without fallback."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q_BNLH, k_BKLH, v_BKLH, 0.0, True, False, scale=scale)[0]


def cudnn(q_BNLH: Tensor, k_BKLH: Tensor, v_BKLH: Tensor, scale: float) -> Tensor:
    """Return causal attention [B, N, L, H] by cuDNN's kernel, without fallback."""
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    return kernel(q_BNLH, k_BKLH, v_BKLH, None, True, 0.0, True, False, scale=scale)[0]
