"""Softmax cross-entropy of a chunk on CUDA: loss and gradient of a row while the row is in cache.

One program handles one row: a first pass reads the logits for their maximum and the sum of
exp(logit - maximum) (online softmax, arXiv 1805.02867, algorithm 3); a second pass reads them from
the L2 cache and overwrites them with the gradient. DRAM is read and written once, and no wide copy
of the logits exists, compiled or not. Rows are independent and no kernel uses atomic additions:
equal logits give bitwise equal results. The references are ``loss.softmax_gradient_`` and
``vocabulary._scan``.
"""

# c tokens of a chunk, v local columns of the vocabulary

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
_WARPS = 16
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(logits_cv: Tensor) -> bool:
    """Return True if the kernels support these logits: not fp64, and contiguous rows."""
    return logits_cv.dtype in _TYPES and logits_cv.stride(1) == 1


def gradient_(
    logits_cv: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float, ignore: int
) -> tuple[Tensor, Tensor]:
    """Overwrite logits with the gradient of the loss; return (nll_c, log Z_c), 0 where ignored."""
    nll_c, log_z_c = _empty(logits_cv), _empty(logits_cv)
    _whole[(len(logits_cv),)](
        logits_cv,
        logits_cv.stride(0),
        targets_c,
        nll_c,
        log_z_c,
        logits_cv.shape[1],
        logit_scale,
        z_loss,
        IGNORE=ignore,
        BLOCK=_block(logits_cv),
        num_warps=_WARPS,
    )
    return nll_c, log_z_c


def scan(logits_cv: Tensor, own_c: Tensor, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return maxima, sums of exp(logit - maximum) and targets' logits (0 on other ranks), [c]."""
    largest_c, sums_c, target_c = (_empty(logits_cv) for _ in range(3))
    _statistics[(len(logits_cv),)](
        logits_cv,
        logits_cv.stride(0),
        own_c,
        largest_c,
        sums_c,
        target_c,
        logits_cv.shape[1],
        logit_scale,
        BLOCK=_block(logits_cv),
        num_warps=_WARPS,
    )
    return largest_c, sums_c, target_c


def write_(
    logits_cv: Tensor, own_c: Tensor, largest_c: Tensor, weight_c: Tensor, logit_scale: float
) -> None:
    """Write weight * exponential - scale * onehot over the logits."""
    _gradient[(len(logits_cv),)](
        logits_cv,
        logits_cv.stride(0),
        own_c,
        largest_c,
        weight_c,
        logits_cv.shape[1],
        logit_scale,
        BLOCK=_block(logits_cv),
        num_warps=_WARPS,
    )


def _empty(logits_cv: Tensor) -> Tensor:
    return logits_cv.new_empty(len(logits_cv), dtype=torch.float32)


def _block(logits_cv: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits_cv.shape[1]))


@triton.jit
def _scan_row(row, columns, scale, BLOCK: tl.constexpr):
    """Return the maximum of a row and the sum of exp(logit - maximum)."""
    largest = float("-inf")
    total = 0.0
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(row + place, mask=place < columns, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        largest = higher
    return largest, total


@triton.jit
def _write_row(row, columns, scale, own, largest, weight, BLOCK: tl.constexpr):
    """Write weight * exponential, minus the scale at ``own``; weight 0 marks an ignored target."""
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < columns
        x = tl.load(row + place, mask=mask, other=0.0).to(tl.float32) * scale
        gradient = tl.exp(x - largest) * weight
        gradient = tl.where(place == own, gradient - scale, gradient)
        tl.store(row + place, gradient.to(row.dtype.element_ty), mask=mask)


@triton.jit
def _whole(
    logits,
    stride,
    targets,
    nll,
    log_zs,
    columns,
    scale,
    z_loss,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(targets + token)
    if target == IGNORE:
        tl.store(nll + token, 0.0)
        tl.store(log_zs + token, 0.0)
        _write_row(row, columns, 0.0, -1, 0.0, 0.0, BLOCK)
    else:
        at_target = tl.load(row + target).to(tl.float32) * scale
        largest, total = _scan_row(row, columns, scale, BLOCK)
        log_z = largest + tl.log(total)
        tl.store(nll + token, log_z - at_target)
        tl.store(log_zs + token, log_z)
        # d/dlogits of -log p(t) + z log²Z is (1 + 2 z log Z) p - onehot(t).
        weight = (1.0 + 2.0 * z_loss * log_z) * scale / total
        _write_row(row, columns, scale, target, largest, weight, BLOCK)


@triton.jit
def _statistics(logits, stride, own, largests, sums, targets, columns, scale, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(own + token)
    here = (target >= 0) & (target < columns)
    at_target = tl.load(row + tl.where(here, target, 0)).to(tl.float32) * scale
    largest, total = _scan_row(row, columns, scale, BLOCK)
    tl.store(largests + token, largest)
    tl.store(sums + token, total)
    tl.store(targets + token, tl.where(here, at_target, 0.0))


@triton.jit
def _gradient(logits, stride, own, largests, weights, columns, scale, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * stride
    target = tl.load(own + token)
    largest = tl.load(largests + token)
    weight = tl.load(weights + token)
    _write_row(row, columns, scale, target, largest, weight, BLOCK)
