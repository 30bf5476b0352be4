"""Attention blocks on CUDA by variable-length flash kernels of torch or flash-attn.

Both kernels process all runs in one call and support only half types and head widths of 8 to 256 in
steps of 8. They are called below their autograd functions, because the backward pass of a block
takes the merged output and log-sum-exp.
"""

# Q queries, S keys, N query heads, K key/value heads, H head width

from __future__ import annotations

import functools
import importlib.metadata
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Positive lengths of the runs; ``causal``: keys up to the query's index, equal lengths."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool


@functools.cache  # avoids file system access in every layer
def has_flash_attn() -> bool:
    """Return True if flash-attn is installed with the function names used below (since 2.7)."""
    try:
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 7)


def takes(dtype: torch.dtype, head_width: int) -> bool:
    """Return True if the kernels support the type and head width."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and head_width % 8 == 0 and head_width <= 256


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU to ``device`` without synchronizing with the device."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _bounds(runs: Runs, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Return cumulative lengths of queries and of keys, int32, and the longest run of each."""
    both = [list(accumulate(lengths, initial=0)) for lengths in (runs.queries, runs.keys)]
    cu_q, cu_k = to_device(torch.tensor(both, dtype=torch.int32), device).unbind()
    return cu_q, cu_k, max(runs.queries), max(runs.keys)


def torch_forward(
    q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute ``kernels.attention_block`` by torch's kernel."""
    bounds = _bounds(runs, q_QNH.device)
    kernel = torch.ops.aten._flash_attention_forward
    o_QNH, lse_NQ, *_ = kernel(
        q_QNH, k_SKH, v_SKH, *bounds, 0.0, runs.causal, return_debug_mask=False, scale=scale
    )
    return o_QNH, lse_NQ


def torch_backward(
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    runs: Runs,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``kernels.attention_block_backward`` by torch's kernel."""
    bounds = _bounds(runs, q_QNH.device)
    # RNG state and an obsolete offset, which the kernel reads only for dropout.
    state = torch.zeros(2, dtype=torch.uint64, device=q_QNH.device)
    unused = torch.empty(0, device=q_QNH.device)
    given = (grad_QNH.contiguous(), q_QNH, k_SKH, v_SKH, o_QNH, lse_NQ)
    kernel = torch.ops.aten._flash_attention_backward
    dq, dk, dv = kernel(*given, *bounds, 0.0, runs.causal, state, unused, scale=scale)
    return dq, dk, dv


def package_forward(
    q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute ``kernels.attention_block`` by flash-attn's kernel."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    bounds = _bounds(runs, q_QNH.device)
    o_QNH, lse_NQ, *_ = _flash_attn_varlen_forward(
        q_QNH, k_SKH, v_SKH, *bounds, dropout_p=0.0, softmax_scale=scale, causal=runs.causal
    )
    return o_QNH, lse_NQ


def package_backward(
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    runs: Runs,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``kernels.attention_block_backward`` by flash-attn's kernel."""
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    grads = tuple(x.new_empty(x.shape) for x in (q_QNH, k_SKH, v_SKH))
    given = (grad_QNH.contiguous(), q_QNH, k_SKH, v_SKH, o_QNH, lse_NQ)
    _flash_attn_varlen_backward(
        *given,
        *grads,
        *_bounds(runs, q_QNH.device),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=runs.causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads
