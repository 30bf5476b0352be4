"""Ring attention for documents that are sharded over several ranks.

Member j of n computes attention of its queries on the current keys, sends these keys and values to
the next member and receives keys and values from the previous member, n - 1 times. Blocks are
merged by their log-sum-exp (arXiv 2310.01889; the zig-zag sharding of ``shard.py`` halves the
work). In the backward pass keys and values circulate again, and their gradients follow one step
behind: the sum of a member's gradients starts at the next member, accumulates the share of each
member, and arrives at the owner after n - 1 hops. Each hop is posted before the block that overlaps
with it is computed. All documents of a unit travel in one message, keys and values together; sizes
are read from the table, so ranks do not exchange sizes.

All rings use the group of all hdp ranks, so rings of arbitrary ranks need no further communicators.
With NCCL all ranks must have communicated in this group before some of them send messages
(``groups.warm_up``). NCCL messages have no tags: all members post the same messages in the same
order (``messages.py``).
"""

# T rows of this rank, S rows of the current source member, N query heads, K key/value heads, H head
# width

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.parallel.hdp.kernels import attention_block, attention_block_backward, merge_block
from allometry.parallel.hdp.kernels_cuda import Runs, to_device
from allometry.parallel.hdp.shard import Pairing, Ring, Rows

RING_OPERATOR = "allometry::ring_attention"
"""Operator name of the forward pass; the block kernels run inside this operator."""

# Kind of a message, part of its tag.
_KEYS, _KEYS_AGAIN, _GRADIENTS = range(3)
_CHANNELS = 3


@torch.library.custom_op(RING_OPERATOR, mutates_args=())
def ring_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, table: Tensor, group_name: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Return causal attention within each document [T, N, H] and its log-sum-exp [N, T].

    Rows are the member's chunks (``shard.chunks``) of each document, then padding, whose output is
    zero. ``table`` (``shard.ring_table``) lists the members: all members call this function at the
    same time, each with its own table, in the group ``group_name``, whose ranks are the hdp ranks.
    """
    ring, group = Ring.of(table), _group(group_name)
    tokens = ring.tokens(ring.member)
    o_TNH = q_TNH.new_zeros(q_TNH.shape, dtype=_wide(q_TNH.dtype))
    lse_NT = o_TNH.new_zeros(o_TNH.shape[1], o_TNH.shape[0])
    kv_2SKH = torch.stack([k_TKH[:tokens], v_TKH[:tokens]])
    for step in range(ring.size):
        source = ring.source(step)
        hop = None
        if step < ring.size - 1:
            hop = _Hop(ring, group, kv_2SKH, ring.tokens(ring.source(step + 1)), _KEYS)
        pairing = ring.pairing(source)
        if pairing is not None:
            rows, keys = (_select(side, q_TNH.device) for side in (pairing.queries, pairing.keys))
            k_SKH, v_SKH = kv_2SKH[:, keys]
            part = attention_block(q_TNH[rows], k_SKH, v_SKH, _runs(pairing), scale)
            merge_block(o_TNH, lse_NT, rows, *part, first=source == ring.member)
        if hop is not None:
            kv_2SKH = hop.wait()
    return o_TNH.to(q_TNH.dtype), lse_NT


@torch.library.custom_op("allometry::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    table: Tensor,
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the gradients of padding are zero."""
    ring, group = Ring.of(table), _group(group_name)
    tokens = ring.tokens(ring.member)
    dq_TNH = q_TNH.new_zeros(q_TNH.shape, dtype=_wide(q_TNH.dtype))
    kv_2SKH = torch.stack([k_TKH[:tokens], v_TKH[:tokens]])
    own_2SKH = dkv_2SKH = torch.zeros_like(kv_2SKH, dtype=dq_TNH.dtype)
    homeward = None
    for step in range(ring.size):
        hop = None
        if step < ring.size - 1:
            hop = _Hop(ring, group, kv_2SKH, ring.tokens(ring.source(step + 1)), _KEYS_AGAIN)
        pairing = ring.pairing(ring.source(step))
        parts = None
        if pairing is not None:
            rows, keys = (_select(side, q_TNH.device) for side in (pairing.queries, pairing.keys))
            k_SKH, v_SKH = kv_2SKH[:, keys]
            given = (grad_TNH[rows], q_TNH[rows], k_SKH, v_SKH, o_TNH[rows], lse_NT[:, rows])
            parts = attention_block_backward(*given, _runs(pairing), scale)
        # The member after a source starts the sum of the source's gradients; later members add to
        # it.
        if step == 1:
            dkv_2SKH = torch.zeros_like(kv_2SKH, dtype=dq_TNH.dtype)
        elif homeward is not None:
            dkv_2SKH = homeward.wait()
        if parts is not None:
            dq_TNH[rows] += parts[0]
            dkv_2SKH[0, keys] += parts[1]
            dkv_2SKH[1, keys] += parts[2]
        if step > 0:
            size = ring.tokens(ring.source(step + 1))
            homeward = _Hop(ring, group, dkv_2SKH, size, _GRADIENTS)
        if hop is not None:
            kv_2SKH = hop.wait()
    if homeward is not None:
        own_2SKH += homeward.wait()
    dk_TKH, dv_TKH = k_TKH.new_zeros(k_TKH.shape), v_TKH.new_zeros(v_TKH.shape)
    dk_TKH[:tokens], dv_TKH[:tokens] = own_2SKH
    return dq_TNH.to(q_TNH.dtype), dk_TKH, dv_TKH


class _Hop:
    """One message to the next member and one from the previous member, both in flight."""

    def __init__(
        self, ring: Ring, group: dist.ProcessGroup, sent_2SKH: Tensor, rows: int, channel: int
    ) -> None:
        """Post both messages, to receive ``rows``; keep ``sent_2SKH`` unchanged until ``wait``."""
        _, _, K, H = sent_2SKH.shape
        self._sent, self._received = sent_2SKH, sent_2SKH.new_empty(2, rows, K, H)
        tag = ring.tag * _CHANNELS + channel
        # Empty messages are skipped; the peer's table has the same sizes.
        messages = [
            dist.P2POp(operation, tensor, group=group, tag=tag, group_peer=peer)
            for operation, tensor, peer in (
                (dist.isend, self._sent, ring.next_rank),
                (dist.irecv, self._received, ring.previous_rank),
            )
            if tensor.numel() > 0
        ]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Tensor:
        """Return the received tensor."""
        for work in self._works:
            work.wait()
        return self._received


def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _runs(pairing: Pairing) -> Runs:
    return Runs(pairing.queries.lengths, pairing.keys.lengths, pairing.causal)


def _select(rows: Rows, device: torch.device) -> slice | Tensor:
    index = rows.index()
    return index if isinstance(index, slice) else to_device(torch.from_numpy(index), device)


@ring_attention.register_fake
def _(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, table: Tensor, group_name: str, scale: float
) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    return q_TNH.new_empty(q_TNH.shape), q_TNH.new_empty((N, T), dtype=_wide(q_TNH.dtype))


@ring_attention_backward.register_fake
def _(
    grad_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    table: Tensor,
    group_name: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_TNH, dk_TKH, dv_TKH = (x.new_empty(x.shape) for x in (q_TNH, k_TKH, v_TKH))
    return dq_TNH, dk_TKH, dv_TKH


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_TNH, k_TKH, v_TKH, table, ctx.group_name, ctx.scale = inputs
    ctx.save_for_backward(q_TNH, k_TKH, v_TKH, *output, table)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_TNH: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = ring_attention_backward(grad_TNH, *ctx.saved_tensors, ctx.group_name, ctx.scale)
    return *grads, None, None, None


ring_attention.register_autograd(_differentiate, setup_context=_save)
