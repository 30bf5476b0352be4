"""Ring attention with prefixes of streams: each rank merges its queries' prefix block once.

Keys and values of tokens travel around the ring (``ring.py``), for all streams in one message. The
prefixes are parameters, so every rank has them: the attention of its queries to the prefix is one
more block, merged by its log-sum-exp. The gradient of a prefix is a partial sum over the rank's
queries, as of any replicated parameter.
"""

# P streams, T rows of this rank in all streams, t = T/P, N query heads, K key/value heads,
# H head width, n tokens of a prefix

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from allometry.models.documents import Documents
from allometry.models.streams import OverRing
from allometry.parallel.hdp.kernels import (
    attention_block,
    attention_block_backward,
    merge_block,
)
from allometry.parallel.hdp.kernels_cuda import Runs
from allometry.parallel.hdp.ring import ring_attention, ring_attention_backward
from allometry.parallel.hdp.shard import Ring, repeated_table

PREFIX_RING_OPERATOR = "allometry::prefixed_ring_attention"
"""Operator name of the forward pass; ring and block kernels run inside this operator."""


def prefix_over_ring(group_name: str) -> OverRing:
    """Return the attention of ``Prefix`` to documents on a ring of the group's ranks."""

    def attend(
        q_ZLNH: Tensor,
        k_ZLKH: Tensor,
        v_ZLKH: Tensor,
        keys_PnKH: Tensor,
        values_PnKH: Tensor,
        documents: Documents,
        scale: float,
    ) -> Tensor:
        assert documents.ring is not None
        given = (x.flatten(0, 1) for x in (q_ZLNH, k_ZLKH, v_ZLKH))
        prefix = keys_PnKH, values_PnKH
        o_TNH, _ = prefixed_ring_attention(*given, *prefix, documents.ring, group_name, scale)
        return o_TNH.view(q_ZLNH.shape)

    return attend


@torch.library.custom_op(PREFIX_RING_OPERATOR, mutates_args=())
def prefixed_ring_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    keys_PnKH: Tensor,
    values_PnKH: Tensor,
    table: Tensor,
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return attention to prefix and document [T, N, H] and its log-sum-exp [N, T].

    Each of P streams has the rows of ``ring_attention`` in order, padding included, whose output is
    zero. ``table`` describes the documents of one stream.
    """
    rows_R = _rows(q_TNH, len(keys_PnKH), table)
    inputs = (x.index_select(0, rows_R) for x in (q_TNH, k_TKH, v_TKH))
    every = repeated_table(table, len(keys_PnKH))
    o_RNH, lse_NR = ring_attention(*inputs, every, group_name, scale)
    o_RNH, lse_NR = o_RNH.to(lse_NR.dtype, copy=True), lse_NR.clone()
    if len(rows_R):
        part = attention_block(
            q_TNH.index_select(0, rows_R),
            keys_PnKH.flatten(0, 1),
            values_PnKH.flatten(0, 1),
            _runs(rows_R, keys_PnKH),
            scale,
        )
        merge_block(o_RNH, lse_NR, slice(0, len(rows_R)), *part, first=False)
    o_TNH = q_TNH.new_zeros(q_TNH.shape).index_copy(0, rows_R, o_RNH.to(q_TNH.dtype))
    lse_NT = lse_NR.new_zeros(len(lse_NR), len(q_TNH)).index_copy(1, rows_R, lse_NR)
    return o_TNH, lse_NT


@torch.library.custom_op("allometry::prefixed_ring_attention_backward", mutates_args=())
def prefixed_ring_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    keys_PnKH: Tensor,
    values_PnKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    table: Tensor,
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and of this rank's queries in prefix keys and values."""
    rows_R = _rows(q_TNH, len(keys_PnKH), table)
    grad_RNH, q_RNH, k_RKH, v_RKH, o_RNH = (
        x.index_select(0, rows_R) for x in (grad_TNH, q_TNH, k_TKH, v_TKH, o_TNH)
    )
    lse_NR = lse_NT.index_select(1, rows_R)
    every = repeated_table(table, len(keys_PnKH))
    given = (grad_RNH, q_RNH, k_RKH, v_RKH, o_RNH, lse_NR, every, group_name, scale)
    found = ring_attention_backward(*given)
    grads = [x.new_zeros(x.shape) for x in (q_TNH, k_TKH, v_TKH, keys_PnKH, values_PnKH)]
    if len(rows_R):
        prefix = keys_PnKH.flatten(0, 1), values_PnKH.flatten(0, 1)
        runs = _runs(rows_R, keys_PnKH)
        parts = attention_block_backward(grad_RNH, q_RNH, *prefix, o_RNH, lse_NR, runs, scale)
        for into, made in zip(grads[3:], parts[1:], strict=True):
            into.copy_(made.view(into.shape))
        found = (found[0] + parts[0], *found[1:])
    for into, made in zip(grads[:3], found, strict=True):
        into.index_copy_(0, rows_R, made)
    dq, dk, dv, dkeys, dvalues = grads
    return dq, dk, dv, dkeys, dvalues


def _rows(q_TNH: Tensor, count: int, table: Tensor) -> Tensor:
    """Return the indices of all rows without padding, stream by stream, int64."""
    ring = Ring.of(table)
    each, tokens = len(q_TNH) // count, ring.tokens(ring.member)
    places = torch.arange(len(q_TNH), device=q_TNH.device).view(count, each)
    return places[:, :tokens].flatten()


def _runs(rows_R: Tensor, keys_PnKH: Tensor) -> Runs:
    count, tokens = keys_PnKH.shape[:2]
    return Runs((len(rows_R) // count,) * count, (tokens,) * count, False)


@prefixed_ring_attention.register_fake
def _(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    keys_PnKH: Tensor,
    values_PnKH: Tensor,
    table: Tensor,
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    return q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty((N, T), dtype=wide)


@prefixed_ring_attention_backward.register_fake
def _(grad_TNH: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dkeys, dvalues = (x.new_empty(x.shape) for x in inputs[:5])
    return dq, dk, dv, dkeys, dvalues


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, table, ctx.group_name, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, table)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = prefixed_ring_attention_backward(grad_TNH, *saved, ctx.group_name, ctx.scale)
    return *grads, None, None, None


prefixed_ring_attention.register_autograd(_differentiate, setup_context=_save)
