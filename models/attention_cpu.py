"""Attention within packed documents on a CPU: torch's flash kernel on documents of like length.

One call for all documents of one padded length is many times faster than a dense mask, and as one
opaque operator with a registered backward it leaves a compiled block whole.
"""

# T tokens, N query heads, K key/value heads, H head width, n documents of one padded length P

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def padded_lengths(lengths: Tensor) -> Tensor:
    """Round lengths up by at most an eighth (and to 32), so that few different ones are left.

    The kernel's matrix products are generated for each shape they meet and kept: with every length
    its own shape, a process grows by hundreds of megabytes.
    """
    octave = (lengths - 1).clamp(min=1).log2().floor().long()
    step = (1 << (octave - 3)).clamp(min=32)
    return (lengths + step - 1) // step * step


def _like_documents(cu_lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each padded length: rows [n, P] among the T tokens, and whether each is the document's.

    Rows past a document's end repeat its last token: finite numbers that causality keeps from the
    document's own rows.
    """
    lengths = cu_lengths.diff().long()
    filled = lengths > 0  # the kernel divides by the length: an empty document kills the process
    starts, lengths = cu_lengths[:-1].long()[filled], lengths[filled]
    padded = padded_lengths(lengths)
    for size in padded.unique().tolist():
        chosen = padded == size
        start_n1, length_n1 = starts[chosen, None], lengths[chosen, None]
        place_P = torch.arange(size)
        yield start_n1 + torch.minimum(place_P, length_n1 - 1), place_P < length_n1


def _gather(x_TNH: Tensor, rows_nP: Tensor) -> Tensor:
    return x_TNH[rows_nP].transpose(1, 2)  # [n, N, P, H]


def _scatter(whole_TNH: Tensor, part_nNPH: Tensor, rows_nP: Tensor, own_nP: Tensor) -> None:
    whole_TNH[rows_nP[own_nP]] = part_nNPH.transpose(1, 2)[own_nP]


@torch.library.custom_op("allometry::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return causal attention within each document [T, N, H] and its log-sum-exp [N, T]."""
    assert int(cu_lengths[-1]) == q_TNH.shape[0], (cu_lengths[-1], q_TNH.shape)
    o_TNH, lse_NT = _outputs(q_TNH)
    for rows_nP, own_nP in _like_documents(cu_lengths):
        q, k, v = (_gather(x, rows_nP) for x in (q_TNH, k_TKH, v_TKH))
        o, lse_nNP = _forward_kernel(q, k, v, is_causal=True, scale=scale)
        _scatter(o_TNH, o, rows_nP, own_nP)
        lse_NT[:, rows_nP[own_nP]] = lse_nNP.transpose(0, 1)[:, own_nP]
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
    for rows_nP, own_nP in _like_documents(cu_lengths):
        q, k, v, o = (_gather(x, rows_nP) for x in (q_TNH, k_TKH, v_TKH, o_TNH))
        lse_nNP = lse_NT[:, rows_nP].transpose(0, 1).contiguous()
        grad = _gather(grad_TNH, rows_nP) * own_nP[:, None, :, None]
        parts = _backward_kernel(grad, q, k, v, o, lse_nNP, 0.0, True, scale=scale)
        for whole, part in zip(grads, parts, strict=True):
            _scatter(whole, part, rows_nP, own_nP)
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
