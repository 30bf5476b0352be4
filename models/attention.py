"""Causal attention inside documents: dispatch to back ends, and the reference implementation."""

# B batch, L length, T = B*L, N query heads, K key/value heads, G = N/K, H head width

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.models import attention_cuda
from allometry.models.attention_blocked import blocked_attention
from allometry.models.attention_packed import packed_attention
from allometry.models.documents import Documents, causal_mask
from allometry.scaling.attention import (
    AttentionBackend,
    AttentionCall,
    choose_backend,
    installed,
    named,
)


class Attend(Protocol):
    """Causal attention within each document, [B, L, N, H], over a query's last ``window`` keys."""

    def __call__(
        self,
        q_BLNH: Tensor,
        k_BLKH: Tensor,
        v_BLKH: Tensor,
        documents: Documents | None,
        scale: float,
        /,
        *,
        window: int | None = None,
    ) -> Tensor:
        """``scale`` multiplies q k^T; ``window`` None: all keys up to the query's position."""


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def attend(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    backend: str | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Return softmax(scale * q k^T) v [B, L, N, H], causal, within each document.

    Without ``documents`` each sequence is one document. With a ``window`` query i attends to keys
    i - window + 1 to i (arXiv 2004.05150). Query head n uses key/value head n // (N/K)
    (arXiv 2305.13245). ``backend``: a name in ``scaling.attention.BACKENDS``; None selects the
    first back end that supports the call. Values may be narrower than keys: for back ends whose
    kernel needs one width, the values are padded with zeros. For example,
    ``attend(q, k, v, None, 64**-0.5, "reference")``.
    """
    assert q_BLNH.shape[2] % k_BLKH.shape[2] == 0, (q_BLNH.shape, k_BLKH.shape)
    if window is not None and window >= q_BLNH.shape[1]:
        window = None
    if backend is None:
        compiling = torch.compiler.is_compiling()
        backend = backend_of(q_BLNH, documents, compiled=compiling, window=window).name
    run = RUN[backend] if window is None else partial(RUN[backend], window=window)
    width = v_BLKH.shape[-1]
    if width == q_BLNH.shape[-1] or named(backend).narrow_values:
        return run(q_BLNH, k_BLKH, v_BLKH, documents, scale)
    wide_BLKH = filled(v_BLKH, q_BLNH.shape[-1])
    return run(q_BLNH, k_BLKH, wide_BLKH, documents, scale)[..., :width]


def filled(v_BLKH: Tensor, width: int) -> Tensor:
    """Return the values padded with zeros to ``width``."""
    return F.pad(v_BLKH, (0, width - v_BLKH.shape[-1]))


def attend_by(backend: str | None) -> Attend:
    """Return ``attend`` with a fixed back end; None: the first that supports each call."""
    return attend if backend is None else partial(attend, backend=backend)


def backend_of(
    q_BLNH: Tensor, documents: Documents | None, *, compiled: bool, window: int | None = None
) -> AttentionBackend:
    """Return the back end that ``attend`` uses for these queries."""
    call = AttentionCall(
        q_BLNH.device.type,
        _DTYPES[q_BLNH.dtype],
        packed=documents is not None,
        length=q_BLNH.shape[1],
        compiled=compiled,
        head_width=q_BLNH.shape[3],
        deterministic=torch.are_deterministic_algorithms_enabled(),
        window=window,
    )
    return choose_backend(call, _installed)


@torch.compiler.assume_constant_result  # installed packages do not change in a run
def _installed(package: str | None) -> bool:
    return installed(package)


def _reference(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    dtype = q_BLNH.dtype
    wide = torch.promote_types(dtype, torch.float32)
    groups = q_BLNH.shape[2] // k_BLKH.shape[2]
    q, k, v = q_BLNH.to(wide), k_BLKH.to(wide), v_BLKH.to(wide)
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores_BNLL = scale * torch.einsum("blnh,bmnh->bnlm", q, k)
    mask = _mask(q, documents, window)
    weights_BNLL = scores_BNLL.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnlm,bmnh->blnh", weights_BNLL, v).to(dtype)


def _mask(q_BLNH: Tensor, documents: Documents | None, window: int | None) -> Tensor:
    """Return the mask of keys visible to each query, bool [B or 1, 1, L, L]."""
    if documents is None:
        return causal_mask(q_BLNH.shape[1], q_BLNH.device, window)[None, None]
    return documents.mask(window)[:, None]


def _flash(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is None
    q, k, v, grouped = _heads_first(q_BLNH, k_BLKH, v_BLKH)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        # Always the flash kernel, not torch's choice: the run's record names this back end.
        return attention_cuda.flash(q, k, v, scale).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _cudnn(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    if documents is not None:
        return _packed(q_BLNH, k_BLKH, v_BLKH, documents, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
    return attention_cuda.cudnn(q, k, v, scale).transpose(1, 2)


def _flex(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    from allometry.models.attention_flex import flex  # takes seconds to import

    return flex(q_BLNH, k_BLKH, v_BLKH, documents, scale, window)


def _masked(
    q_BLNH: Tensor,
    k_BLKH: Tensor,
    v_BLKH: Tensor,
    documents: Documents | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    q, k, v, grouped = _heads_first(q_BLNH, k_BLKH, v_BLKH)
    mask = _mask(q_BLNH, documents, window)
    o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


def _heads_first(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Return q, k, v as [B, heads, L, H], and True if torch must group the heads (GQA)."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BLKH, v_BLKH))
    groups = q.shape[1] // k.shape[1]
    # On CUDA only the flash kernel, for half types, supports grouped heads; for other types torch
    # would materialise the scores, at a far higher cost than repeated keys.
    if groups > 1 and q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        groups = 1
    return q, k, v, groups > 1


def _varlen(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is not None
    q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLKH, v_BLKH))
    return attention_cuda.torch_varlen(q, k, v, documents, scale).view(q_BLNH.shape)


def _packed(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, documents: Documents | None, scale: float
) -> Tensor:
    assert documents is not None
    q, k, v = (x.flatten(0, 1) for x in (q_BLNH, k_BLKH, v_BLKH))
    o_TNH, _ = packed_attention(q, k, v, documents.on_cpu(), scale)
    return o_TNH.view(q_BLNH.shape)


RUN: Mapping[str, Callable[..., Tensor]] = {
    "blocked": blocked_attention,
    "flash": _flash,
    "flash3": attention_cuda.flash_attn_3,
    "flash2": attention_cuda.flash_attn_2,
    "varlen": _varlen,
    "cudnn": _cudnn,
    "flex": _flex,
    "packed": _packed,
    "masked": _masked,
    "reference": _reference,
}
"""Function of each of ``scaling.attention.BACKENDS``; back ends with windows have ``window``."""
