"""Attention of some queries on some keys, with the log-sum-exp that merges such blocks.

A block returns its output and the log-sum-exp of its scores; outputs over different keys are merged
by their log-sum-exp. The backward pass of a block takes the *merged* output and log-sum-exp, and so
returns the block's share of the total gradient (arXiv 2205.14135, App. B.2; arXiv 2310.01889).
Every kernel accepts several runs at once: queries of run i see only keys of run i.
"""

# Q queries, S keys, N query heads, K key/value heads, G = N/K, H head width; padded: P and R

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.models.attention_packed import padded_lengths
from allometry.parallel.hdp import kernels_cuda
from allometry.parallel.hdp.kernels_cuda import Runs


class Kernel(NamedTuple):
    """Implementation of a block; ``suits(device, dtype, head width)``: support of an input.

    ``forward`` and ``backward`` have the arguments of ``attention_block`` and
    ``attention_block_backward``.
    """

    name: str
    suits: Callable[[torch.device, torch.dtype, int], bool]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> Kernel:
    """Return the first of ``KERNELS`` that supports the input."""
    return next(kernel for kernel in KERNELS if kernel.suits(device, dtype, head_width))


def attention_block(
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    runs: Runs,
    scale: float,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output [Q, N, H] in q's type and the log-sum-exp [N, Q] in fp32 (fp64 for fp64).

    Query head n uses key/value head n // (N/K); for example, with N = 8 and K = 2 query heads 0 to
    3 use key/value head 0. ``kernel`` None: ``choose_kernel``.
    """
    _check(q_QNH, k_SKH, runs)
    kernel = kernel or choose_kernel(q_QNH.device, q_QNH.dtype, q_QNH.shape[-1])
    return kernel.forward(q_QNH, k_SKH, v_SKH, runs, scale)


def attention_block_backward(
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    runs: Runs,
    scale: float,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's share of the gradients of q, k and v, in their shapes and q's type.

    ``o_QNH`` and ``lse_NQ`` are merged over all keys that the queries see, in all blocks.
    """
    _check(q_QNH, k_SKH, runs)
    kernel = kernel or choose_kernel(q_QNH.device, q_QNH.dtype, q_QNH.shape[-1])
    given = (grad_QNH.to(q_QNH.dtype), q_QNH, k_SKH, v_SKH, o_QNH, lse_NQ.contiguous())
    return kernel.backward(*given, runs, scale)


def merge_block(
    o_TNH: Tensor,
    lse_NT: Tensor,
    rows: slice | Tensor,
    part_QNH: Tensor,
    part_lse_NQ: Tensor,
    *,
    first: bool,
) -> None:
    """Merge a block into the rows of its queries, in place; ``first``: the rows are uninitialized.

    ``o_TNH`` and ``lse_NT`` are fp32 (fp64 for fp64), so rounding does not accumulate over blocks.
    """
    if first:
        o_TNH[rows], lse_NT[:, rows] = part_QNH.to(o_TNH.dtype), part_lse_NQ
        return
    before_NQ = lse_NT[:, rows]
    lse_NQ = torch.logaddexp(before_NQ, part_lse_NQ)
    weight_QN1, part_weight_QN1 = (
        (each_NQ - lse_NQ).exp().t()[..., None] for each_NQ in (before_NQ, part_lse_NQ)
    )
    o_TNH[rows] = o_TNH[rows] * weight_QN1 + part_QNH * part_weight_QN1
    lse_NT[:, rows] = lse_NQ


def _check(q_QNH: Tensor, k_SKH: Tensor, runs: Runs) -> None:
    # An empty run would end the process (CPU) or give an infinite log-sum-exp (CUDA).
    assert min(runs.queries) > 0, runs
    assert min(runs.keys) > 0, runs
    assert not runs.causal or runs.queries == runs.keys, runs
    assert (sum(runs.queries), sum(runs.keys)) == (len(q_QNH), len(k_SKH)), runs
    assert q_QNH.shape[1] % k_SKH.shape[1] == 0, (q_QNH.shape, k_SKH.shape)


def _each_forward(
    one: Callable[..., tuple[Tensor, Tensor]],
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    runs: Runs,
    scale: float,
) -> tuple[Tensor, Tensor]:
    by_run = zip(
        q_QNH.split(runs.queries), k_SKH.split(runs.keys), v_SKH.split(runs.keys), strict=True
    )
    parts = [one(q, k, v, runs.causal, scale) for q, k, v in by_run]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def _each_backward(
    one: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    runs: Runs,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    by_run = zip(
        grad_QNH.split(runs.queries),
        q_QNH.split(runs.queries),
        k_SKH.split(runs.keys),
        v_SKH.split(runs.keys),
        o_QNH.split(runs.queries),
        lse_NQ.split(runs.queries, dim=1),
        strict=True,
    )
    parts = [one(*tensors, runs.causal, scale) for tensors in by_run]
    if len(parts) == 1:
        return parts[0]
    dq, dk, dv = (torch.cat(of_runs) for of_runs in zip(*parts, strict=True))
    return dq, dk, dv


def _weights(
    q_QNH: Tensor, k_SKH: Tensor, causal: bool, scale: float, lse_NQ: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return exp(scores - lse) [K, G, Q, S] and the lse [N, Q], computed here if None is given."""
    (Q, N, H), (S, K, _) = q_QNH.shape, k_SKH.shape
    scores_KGQS = scale * torch.einsum("qkgh,skh->kgqs", q_QNH.view(Q, K, N // K, H), k_SKH)
    if causal:
        later_QS = torch.ones(Q, S, dtype=torch.bool, device=q_QNH.device).triu(1)
        scores_KGQS = scores_KGQS.masked_fill(later_QS, float("-inf"))
    if lse_NQ is None:
        lse_NQ = scores_KGQS.logsumexp(dim=-1).view(N, Q)
    return (scores_KGQS - lse_NQ.view(K, N // K, Q, 1)).exp(), lse_NQ


def _written_out(
    q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_QNH.dtype, torch.float32)
    q, k, v = (x.to(wide).contiguous() for x in (q_QNH, k_SKH, v_SKH))
    weights_KGQS, lse_NQ = _weights(q, k, causal, scale, None)
    o_QKGH = torch.einsum("kgqs,skh->qkgh", weights_KGQS, v)
    return o_QKGH.reshape(q_QNH.shape).to(q_QNH.dtype), lse_NQ


def _written_out_backward(
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q_QNH.dtype, torch.float32)
    grad, q, k, v, o = (x.to(wide).contiguous() for x in (grad_QNH, q_QNH, k_SKH, v_SKH, o_QNH))
    (Q, N, H), K = q.shape, k.shape[1]
    weights_KGQS, _ = _weights(q, k, causal, scale, lse_NQ)
    grad_QKGH, q_QKGH = (x.view(Q, K, N // K, H) for x in (grad, q))
    dv = torch.einsum("kgqs,qkgh->skh", weights_KGQS, grad_QKGH)
    mean_KGQ1 = (grad * o).sum(-1).t().reshape(K, N // K, Q, 1)
    slope_KGQS = torch.einsum("qkgh,skh->kgqs", grad_QKGH, v) - mean_KGQ1
    slope_KGQS = scale * weights_KGQS * slope_KGQS
    dq = torch.einsum("kgqs,skh->qkgh", slope_KGQS, k).reshape(q.shape)
    dk = torch.einsum("kgqs,qkgh->skh", slope_KGQS, q_QKGH)
    return dq.to(q_QNH.dtype), dk.to(q_QNH.dtype), dv.to(q_QNH.dtype)


def _cpu(
    q_QNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    Q, (P, R) = len(q_QNH), _cpu_lengths(q_QNH, k_SKH)
    q, k, v = (_fill(x, size) for x, size in ((q_QNH, P), (k_SKH, R), (v_SKH, R)))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mask = _hide_filling(k_SKH, R, causal)
    o_1NPH, lse_1NP = kernel(q, k, v, is_causal=causal, attn_mask=mask, scale=scale)
    return o_1NPH[0, :, :Q].transpose(0, 1), lse_1NP[0, :, :Q]


def _cpu_backward(
    grad_QNH: Tensor,
    q_QNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    o_QNH: Tensor,
    lse_NQ: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (P, R), sizes = _cpu_lengths(q_QNH, k_SKH), (len(q_QNH), len(k_SKH), len(k_SKH))
    # Padding rows have zero gradients and so do not change the gradients of the keys.
    grad, q, o = (_fill(x, P) for x in (grad_QNH, q_QNH, o_QNH))
    k, v = (_fill(x, R) for x in (k_SKH, v_SKH))
    lse_1NP = F.pad(lse_NQ, (0, P - sizes[0]))[None].contiguous()
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mask = _hide_filling(k_SKH, R, causal)
    parts = kernel(grad, q, k, v, o, lse_1NP, 0.0, causal, attn_mask=mask, scale=scale)
    dq, dk, dv = (x[0, :, :size].transpose(0, 1) for x, size in zip(parts, sizes, strict=True))
    return dq, dk, dv


def _cpu_lengths(q_QNH: Tensor, k_SKH: Tensor) -> tuple[int, int]:
    """Return the padded lengths of queries and keys.

    The kernel compiles and caches its half-precision products for each new shape: with one shape
    for each document and source, a process would grow by gigabytes.
    """
    lengths = torch.tensor([len(q_QNH), len(k_SKH)])
    if q_QNH.dtype in (torch.bfloat16, torch.float16):
        lengths = padded_lengths(lengths)
    P, R = lengths.tolist()
    return P, R


def _fill(x_QNH: Tensor, size: int) -> Tensor:
    """Return [1, N, size, H], padded with zeros at the end."""
    if size > len(x_QNH):
        x_QNH = F.pad(x_QNH, (0, 0, 0, 0, 0, size - len(x_QNH)))
    return x_QNH.transpose(0, 1)[None]


def _hide_filling(k_SKH: Tensor, size: int, causal: bool) -> Tensor | None:
    """Return the additive mask of padding keys [1, size]; a causal mask hides padding by itself."""
    if causal or size == len(k_SKH):
        return None
    shown_1S = k_SKH.new_zeros(1, len(k_SKH))
    return F.pad(shown_1S, (0, size - len(k_SKH)), value=float("-inf"))


def _on_cuda(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    return device.type == "cuda" and kernels_cuda.takes(dtype, head_width)


CPU = Kernel(
    "torch's flash kernel for CPUs",
    lambda device, *_: device.type == "cpu",
    partial(_each_forward, _cpu),
    partial(_each_backward, _cpu_backward),
)
FLASH_ATTN = Kernel(
    "flash-attn",
    lambda *call: _on_cuda(*call) and kernels_cuda.has_flash_attn(),
    kernels_cuda.package_forward,
    kernels_cuda.package_backward,
)
CUDA = Kernel(
    "torch's flash kernel for GPUs",
    _on_cuda,
    kernels_cuda.torch_forward,
    kernels_cuda.torch_backward,
)
WRITTEN_OUT = Kernel(
    "written out",  # stores the scores of one run
    lambda *_: True,
    partial(_each_forward, _written_out),
    partial(_each_backward, _written_out_backward),
)
KERNELS = (CPU, FLASH_ATTN, CUDA, WRITTEN_OUT)
"""All kernels in order of preference."""
