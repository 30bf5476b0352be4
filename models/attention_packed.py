"""Attention within packed documents: one batched kernel call for each padded document length.

If a kernel supports only equal lengths, one call per padded length is many times faster than a
dense mask: with torch's flash kernel on a CPU and cuDNN's on CUDA (torch's own cuDNN call for
ragged lengths is disabled, and its backward passes the head width as the longest length). A single
custom operator with a registered backward avoids graph breaks in a compiled block.
"""

# T tokens, N query heads, K key/value heads, H head width, n documents of one padded length P

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def padded_lengths(lengths: Tensor, least: int = 32) -> Tensor:
    """Round lengths up by at most an eighth (and to ``least``), so that few distinct ones remain.

    Kernels are generated for each shape and cached: with a shape for every length, a CPU process
    grows by hundreds of megabytes, and cuDNN plans each shape. For example, 100 becomes 128 and
    1000 becomes 1024.
    """
    octave = (lengths - 1).clamp(min=1).log2().floor().long()
    step = (1 << (octave - 3)).clamp(min=least)
    return (lengths + step - 1) // step * step


class _Kernels(NamedTuple):
    """Kernel for equal lengths: q, k, v are [n, heads, P, H], the log-sum-exp [n, N, P].

    ``forward(q, k, v, scale)`` returns output and log-sum-exp, ``backward(grad, q, k, v, o, lse,
    scale)`` the gradients of q, k and v. ``least``: the minimal padded length. ``by_powers``: call
    the kernel with powers of two of documents, so that few shapes are planned. ``spare``: write the
    results of padding rows to a spare row T instead of dropping them, as selecting the other rows
    would wait for the device.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    least: int
    by_powers: bool
    spare: bool


class _Like(NamedTuple):
    """Documents of one padded length.

    ``rows_nP``: index of each row among the T tokens; padding rows repeat the last token of their
    document, finite numbers that the causal mask hides from the document's own rows.
    ``targets_nP``: index of each row's result; T, the spare row, for padding rows. ``own_nP``:
    False for padding rows.
    """

    rows_nP: Tensor
    targets_nP: Tensor
    own_nP: Tensor


_SORTED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Results of ``_like_documents`` by ``cu_lengths`` and device; ``cu_lengths`` is never modified."""


def _like_documents(cu_lengths: Tensor, device: torch.device, kernels: _Kernels) -> list[_Like]:
    """Return ``_sorted_documents``, cached for all layers and passes while ``cu_lengths`` lives."""
    by_device = _SORTED.setdefault(cu_lengths, {})
    key = device, kernels.least, kernels.by_powers
    if key not in by_device:
        by_device[key] = list(_sorted_documents(cu_lengths, device, kernels))
    found: list[_Like] = by_device[key]
    return found


def _sorted_documents(
    cu_lengths: Tensor, device: torch.device, kernels: _Kernels
) -> Iterator[_Like]:
    """Yield the documents of ``cu_lengths`` (on the CPU) by padded length, without device waits."""
    lengths = cu_lengths.diff().long()
    filled = lengths > 0  # the kernel divides by the length: an empty document kills the process
    bounds_2n = torch.stack((cu_lengths[:-1].long(), lengths))[:, filled]
    padded, order = padded_lengths(bounds_2n[1], kernels.least).sort(stable=True)
    sizes, counts = padded.unique_consecutive(return_counts=True)
    bounds_2n = bounds_2n[:, order]
    if device.type == "cuda":
        bounds_2n = bounds_2n.pin_memory().to(device, non_blocking=True)
    T, first = int(cu_lengths[-1]), 0
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        place_P = torch.arange(size, device=device)
        for n in _powers(count) if kernels.by_powers else (count,):
            start_n1, length_n1 = bounds_2n[:, first : first + n, None]
            own_nP = place_P < length_n1
            rows_nP = start_n1 + torch.minimum(place_P, length_n1 - 1)
            yield _Like(rows_nP, rows_nP.where(own_nP, T), own_nP)
            first += n


def _powers(count: int) -> list[int]:
    """Return the powers of two that sum to ``count``, largest first."""
    return [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, is_causal=True, scale=scale)


def _backward_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_nNP: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, q, k, v, o, lse_nNP, 0.0, True, scale=scale)


def _forward_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention
    o, lse, *_ = kernel(q, k, v, None, True, 0.0, True, False, scale=scale)
    return o, lse.view(q.shape[:3])


def _backward_cudnn(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse_nNP: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    if _dimensions_of_lse(q.device, q.dtype) == 4:
        lse_nNP = lse_nNP[..., None]
    # Dropout's generator state, which is not read without dropout; no bias, no ragged lengths.
    unread = torch.zeros((), dtype=torch.int64, device=q.device)
    P = q.shape[2]
    return kernel(
        *(grad, q, k, v, o, lse_nNP, unread, unread, None, None, None, P, P, 0.0, True), scale=scale
    )


@functools.cache
def _dimensions_of_lse(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number of dimensions of cuDNN's log-sum-exp: 3, or 4 in some torch versions."""
    x = torch.zeros(1, 1, 128, 64, dtype=dtype, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True, is_causal=True)[
        1
    ].dim()


CPU = _Kernels(_forward_cpu, _backward_cpu, least=32, by_powers=False, spare=False)
CUDNN = _Kernels(_forward_cudnn, _backward_cudnn, least=128, by_powers=True, spare=True)
_KERNELS = {"cpu": CPU, "cuda": CUDNN}


def _gather(x_TNH: Tensor, rows_nP: Tensor) -> Tensor:
    return x_TNH[rows_nP].transpose(1, 2)  # [n, N, P, H]


def _scatter(whole_SNH: Tensor, part_nPNH: Tensor, like: _Like, T: int) -> None:
    if len(whole_SNH) > T:
        whole_SNH[like.targets_nP] = part_nPNH
    else:
        whole_SNH[like.rows_nP[like.own_nP]] = part_nPNH[like.own_nP]


@torch.library.custom_op("allometry::packed_attention", mutates_args=())
def packed_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return causal attention within each document [T, N, H] and its log-sum-exp [N, T].

    ``cu_lengths`` [documents + 1] must be on the CPU. For example, [0, 3, 8] for two documents.
    """
    return forward(_KERNELS[q_TNH.device.type], q_TNH, k_TKH, v_TKH, cu_lengths, scale)


def forward(
    kernels: _Kernels,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute ``packed_attention`` with the given kernels."""
    assert int(cu_lengths[-1]) == q_TNH.shape[0], (cu_lengths[-1], q_TNH.shape)
    T, spare = len(q_TNH), int(kernels.spare)
    o_SNH, lse_NS = _outputs(q_TNH, spare)
    for like in _like_documents(cu_lengths, q_TNH.device, kernels):
        q, k, v = (_gather(x, like.rows_nP) for x in (q_TNH, k_TKH, v_TKH))
        o, lse_nNP = kernels.forward(q, k, v, scale)
        _scatter(o_SNH, o.transpose(1, 2), like, T)
        _scatter(lse_NS.t(), lse_nNP.transpose(1, 2), like, T)
    return o_SNH[:T], lse_NS[:, :T].contiguous()


def _like(x: Tensor, more: int = 0) -> Tensor:
    # Contiguous; empty_like of a transposed view would keep the strides.
    return x.new_empty((x.shape[0] + more, *x.shape[1:]))


def _outputs(q_TNH: Tensor, more: int = 0) -> tuple[Tensor, Tensor]:
    T, N, _ = q_TNH.shape
    wide = torch.promote_types(q_TNH.dtype, torch.float32)
    return _like(q_TNH, more), q_TNH.new_empty((N, T + more), dtype=wide)


@packed_attention.register_fake
def _(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return _outputs(q_TNH)


@torch.library.custom_op("allometry::packed_attention_backward", mutates_args=())
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
    qkvo = (q_TNH, k_TKH, v_TKH, o_TNH)
    return backward(_KERNELS[q_TNH.device.type], grad_TNH, qkvo, lse_NT, cu_lengths, scale)


def backward(
    kernels: _Kernels,
    grad_TNH: Tensor,
    qkvo: tuple[Tensor, ...],
    lse_NT: Tensor,
    cu_lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``packed_attention_backward`` with the given kernels; ``qkvo`` is (q, k, v, o)."""
    T = len(grad_TNH)
    dq, dk, dv = (_like(x, int(kernels.spare)) for x in qkvo[:3])
    for like in _like_documents(cu_lengths, grad_TNH.device, kernels):
        q, k, v, o = (_gather(x, like.rows_nP) for x in qkvo)
        lse_nNP = lse_NT[:, like.rows_nP].transpose(0, 1).contiguous()
        grad = _gather(grad_TNH, like.rows_nP) * like.own_nP[:, None, :, None]
        parts = kernels.backward(grad, q, k, v, o, lse_nNP, scale)
        for whole, part in zip((dq, dk, dv), parts, strict=True):
            _scatter(whole, part.transpose(1, 2), like, T)
    return dq[:T], dk[:T], dv[:T]


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
