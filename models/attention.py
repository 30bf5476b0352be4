"""Causal attention inside documents: one function, and its plain twin."""

# B batch, L length, T = B*L, N query heads, K key/value heads, G = N/K, H head width

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.models.attention_blocked import LONGEST, blocked_attention
from allometry.models.attention_cpu import packed_attention
from allometry.models.attention_cuda import varlen_attention
from allometry.models.documents import Documents

Attend = Callable[[Tensor, Tensor, Tensor, Documents | None, float], Tensor]
"""(q_BLNH, k_BLKH, v_BLKH, documents, scale) -> [B, L, N, H]: causal, within each document."""

HALF_TYPES = (torch.bfloat16, torch.float16)


class Backend(StrEnum):
    """Ways to compute the same attention."""

    REFERENCE = "reference"  # softmax written out: the twin that tests compare with
    FLASH = "flash"  # torch's scaled_dot_product_attention: no documents
    MASKED = "masked"  # the same with a dense mask: any type, memory grows with L squared
    PACKED = "packed"  # CPU: torch's flash kernel on each document in turn
    BLOCKED = "blocked"  # CPU, compiled, short sequences: products on blocks of queries
    VARLEN = "varlen"  # CUDA: a variable-length flash kernel, half types only


def choose_backend(
    device: torch.device, dtype: torch.dtype, packed: bool, length: int, compiled: bool
) -> Backend:
    """Return the fastest back end that can do it."""
    if device.type == "cpu" and compiled and dtype == torch.bfloat16 and length <= LONGEST:
        return Backend.BLOCKED
    if not packed:
        return Backend.FLASH
    if device.type == "cuda":
        return Backend.VARLEN if dtype in HALF_TYPES else Backend.MASKED
    return Backend.PACKED if device.type == "cpu" else Backend.MASKED


def attend(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    backend: Backend | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v [B, L, N, H], causal, within each document.

    Without ``documents`` each sequence is one document. Query head n uses key/value head
    n // (N/K) (arXiv 2305.13245). Without ``backend``, ``choose_backend`` decides.
    """
    assert q_BLNH.shape[2] % k_BLKH.shape[2] == 0, (q_BLNH.shape, k_BLKH.shape)
    if backend is None:
        backend = choose_backend(
            q_BLNH.device,
            q_BLNH.dtype,
            packed=documents is not None,
            length=q_BLNH.shape[1],
            compiled=torch.compiler.is_compiling(),
        )
    return _BACKENDS[backend](q_BLNH, k_BLKH, v_BLKH, documents, scale)


def _reference(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    dtype = q_BLNH.dtype
    wide = torch.promote_types(dtype, torch.float32)
    groups = q_BLNH.shape[2] // k_BLKH.shape[2]
    q, k, v = q_BLNH.to(wide), k_BLKH.to(wide), v_BLKH.to(wide)
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores_BNLL = scale * torch.einsum("blnh,bmnh->bnlm", q, k)
    if documents is None:
        L = q.shape[1]
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    else:
        mask = documents.mask()[:, None]
    weights_BNLL = scores_BNLL.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnlm,bmnh->blnh", weights_BNLL, v).to(dtype)


def _flash(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is None
    q, k, v, grouped = _heads_first(q_BLNH, k_BLKH, v_BLKH)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _masked(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is not None
    q, k, v, grouped = _heads_first(q_BLNH, k_BLKH, v_BLKH)
    mask = documents.mask()[:, None]
    o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _heads_first(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return q, k, v as [B, heads, L, H] and whether torch is to group the heads itself."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BLKH, v_BLKH))
    groups = q.shape[1] // k.shape[1]
    # On CUDA only the flash kernel, for half types, groups heads; the others would fall back to
    # materialised scores, which costs far more than repeated keys.
    if groups > 1 and q.device.type == "cuda" and q.dtype not in HALF_TYPES:
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        groups = 1
    return q, k, v, groups > 1


def _packed(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is not None
    q, k, v = (t.flatten(0, 1) for t in (q_BLNH, k_BLKH, v_BLKH))
    o_TNH, _ = packed_attention(q, k, v, documents.cu_lengths, scale)
    return o_TNH.view(q_BLNH.shape)


def _varlen(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is not None
    q, k, v = (t.flatten(0, 1) for t in (q_BLNH, k_BLKH, v_BLKH))
    o_TNH = varlen_attention(q, k, v, documents.cu_lengths, documents.max_length, scale)
    return o_TNH.view(q_BLNH.shape)


_BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Documents | None, float], Tensor]] = {
    Backend.REFERENCE: _reference,
    Backend.FLASH: _flash,
    Backend.MASKED: _masked,
    Backend.PACKED: _packed,
    Backend.BLOCKED: blocked_attention,
    Backend.VARLEN: _varlen,
}
