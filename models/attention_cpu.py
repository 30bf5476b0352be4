"""Attention within packed documents on a CPU: torch's flash kernel on each document in turn.

A loop over documents is six times faster than a dense mask, and as one opaque operator with a
registered backward it leaves a compiled block whole.
"""

# T tokens, N query heads, K key/value heads, H head width, S tokens of one document

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _slices(cu_lengths: Tensor) -> Iterator[slice]:
    for start, stop in pairwise(cu_lengths.tolist()):
        if start < stop:  # the kernel divides by the length: an empty document kills the process
            yield slice(start, stop)


def _heads_first(x_TNH: Tensor, document: slice) -> Tensor:
    return x_TNH[document].transpose(0, 1)[None]


@torch.library.custom_op("allometry::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return causal attention within each document [T, N, H] and its log-sum-exp [N, T]."""
    assert int(cu_lengths[-1]) == q_TNH.shape[0], (cu_lengths[-1], q_TNH.shape)
    o_TNH, lse_NT = _outputs(q_TNH)
    for document in _slices(cu_lengths):
        q, k, v = (_heads_first(x, document) for x in (q_TNH, k_TKH, v_TKH))
        o, lse = _forward_kernel(q, k, v, is_causal=True, scale=scale)
        o_TNH[document] = o[0].transpose(0, 1)
        lse_NT[:, document] = lse[0]
    return o_TNH, lse_NT


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)  # contiguous, unlike empty_like of a transposed view


def _outputs(q_TNH: Tensor) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    return _like(q_TNH), q_TNH.new_empty((N, T), dtype=wide)


@packed_attention.register_fake
def _(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _outputs(q_TNH)


@torch.library.custom_op(
    "allometry::packed_attention_backward", mutates_args=(), device_types="cpu"
)
def packed_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    cu_lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grads = _like(q_TNH), _like(k_TKH), _like(v_TKH)
    for document in _slices(cu_lengths):
        grad, q, k, v, o = (
            _heads_first(x, document) for x in (grad_TNH, q_TNH, k_TKH, v_TKH, o_TNH)
        )
        lse = lse_NT[None, :, document]
        parts = _backward_kernel(grad, q, k, v, o, lse, 0.0, True, scale=scale)
        for whole, part in zip(grads, parts, strict=True):
            whole[document] = part[0].transpose(0, 1)
    return grads


@packed_attention_backward.register_fake
def _(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    cu_lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q_TNH), _like(k_TKH), _like(v_TKH)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_TNH, k_TKH, v_TKH, cu_lengths, ctx.scale = inputs
    ctx.save_for_backward(q_TNH, k_TKH, v_TKH, *output, cu_lengths)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_TNH, k_TKH, v_TKH, o_TNH, lse_NT, cu_lengths = ctx.saved_tensors
    grads = packed_attention_backward(
        grad_TNH, q_TNH, k_TKH, v_TKH, o_TNH, lse_NT, cu_lengths, ctx.scale
    )
    return *grads, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)
