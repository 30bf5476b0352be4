"""Fused linear layer and cross-entropy in chunks of tokens, without materialising all logits."""

# T tokens, c tokens of a chunk, D width, V vocabulary

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from allometry.models.products import add_product_, product

IGNORE = -100
"""Target that is excluded from the loss (the same number as in ``allometry.data.batch``)."""


class Segment(NamedTuple):
    """A run of tokens whose losses count ``weight`` times (0-dim; None: once), with this z-loss."""

    tokens: int
    weight: Tensor | None
    z_loss: float


ChunkGradient = Callable[[Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


class ChunkSoftmax(Protocol):
    """Loss of a chunk of tokens from its unscaled logits [c, v].

    v is the number of local columns of the vocabulary: all columns, or a shard.
    """

    def columns(self, weight_VD: Tensor) -> int:
        """Return the columns of the largest shard: all shards cut tokens into the same chunks."""

    def gradient_(
        self, logits_cv: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the logits with the gradient of the loss; return (nll_c, z-loss)."""

    def loss(
        self, logits_cv: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Return (nll_c, z-loss) without changing the logits."""


def row_kernels(logits_cv: Tensor) -> Any:
    """Return the Triton module for these logits, or None if torch's operators compute them."""
    if not logits_cv.is_cuda or importlib.util.find_spec("triton") is None:
        return None
    from allometry.models import loss_triton

    return loss_triton if loss_triton.takes(logits_cv) else None


class WholeSoftmax(ChunkSoftmax):
    """Softmax over the unsharded vocabulary; ``compile`` compiles the torch gradient of a chunk."""

    def __init__(self) -> None:
        self._gradient_: ChunkGradient = softmax_gradient_

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the passes over the logits; the arguments are passed to ``torch.compile``."""
        self._gradient_ = torch.compile(softmax_gradient_, *args, **kwargs)

    @override
    def columns(self, weight_VD: Tensor) -> int:
        return len(weight_VD)

    @override
    def gradient_(
        self, logits_cV: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        kernels = row_kernels(logits_cV)
        if kernels is None:
            return self._gradient_(logits_cV, targets_c, logit_scale, z_loss)
        nll_c, log_z_c = kernels.gradient_(logits_cV, targets_c, logit_scale, z_loss, IGNORE)
        return nll_c, z_loss * log_z_c.square().sum()

    @override
    def loss(
        self, logits_cV: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        scaled = logits_cV.to(_wide(logits_cV)) * logit_scale
        counted_c = targets_c != IGNORE
        log_z_c = scaled.logsumexp(dim=1)
        target_c = scaled.gather(1, targets_c.where(counted_c, 0)[:, None])[:, 0]
        penalty = z_loss * log_z_c.square().where(counted_c, 0.0).sum()
        return (log_z_c - target_c).where(counted_c, 0.0), penalty


class GradientSum:
    """One buffer for the weight gradient of all calls whose backward is still pending.

    For pipeline schedules, whose last stage may run the forwards of all micro-batches before a
    backward: without the buffer each micro-batch keeps a gradient as large as the weight. Every
    forward adds to the buffer; the next backward of any call returns the complete buffer, and a
    backward that finds the buffer empty returns zeros. The weight gradient is complete once all
    calls have been differentiated; all must be, with the same factor. Call ``begin`` at the start
    of each step, to discard gradients of a failed step.
    """

    def __init__(self) -> None:
        self.pending_VD: Tensor | None = None
        self._factor: Tensor | None = None

    def begin(self) -> None:
        """Reset the buffer and the factor."""
        self.pending_VD = self._factor = None

    def take(self, factor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return ``factor`` times the gradients of all forwards since the last ``take``."""
        if self._factor is None:
            self._factor = factor.clone()
        else:
            same = "the losses of one step are differentiated with different factors"
            torch._assert_async(self._factor == factor, same)
        pending_VD, self.pending_VD = self.pending_VD, None
        if pending_VD is None:
            return factor.new_zeros((), dtype=dtype).expand(shape)
        return pending_VD.mul_(factor).to(dtype)


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    softmax: ChunkSoftmax | None = None,
    gradient_sum: GradientSum | None = None,
    cast_VD: Tensor | None = None,
    segments: Sequence[Segment] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (total, nll_T) of logits = ``logit_scale`` * x @ weight.T.

    ``total`` = sum over counted tokens of -log p(target) + ``z_loss`` * (log Z)^2 (PaLM, arXiv
    2204.02311, section 5); ``nll_T`` is the first term of each token, without gradient, 0 where the
    target is ``IGNORE``. Products run in x's type, softmax in fp32 or wider; the weight gradient is
    summed over chunks in fp32 or wider. For example, ``linear_cross_entropy(x, w, targets)[0]``.

    Gradients are computed in the forward pass, while the chunk's logits exist: no T x V tensor is
    stored and no product is repeated. ``total`` can therefore be differentiated with one factor
    only (for x and for the weight together, or for one after the other).
    ``chunk_tokens`` None: ``default_chunk_tokens``. ``softmax`` None: ``WholeSoftmax``, the weight
    is unsharded. With a shard, ``total`` and ``nll_T`` cover the full vocabulary, the weight
    gradient is the shard's, and the gradient of x is the shard's partial sum. ``gradient_sum``
    accumulates the weight gradient over calls. ``cast_VD``: the weight cast to x's type, if there.
    ``segments``: runs of tokens with different weights, of T tokens in all (None: one run of weight
    1 with ``z_loss``).
    """
    assert x_TD.ndim == 2, x_TD.shape
    assert targets_T.shape == x_TD.shape[:1], (targets_T.shape, x_TD.shape)
    softmax = softmax or WholeSoftmax()
    if chunk_tokens is None:
        columns = softmax.columns(weight_VD)
        longest = max((segment.tokens for segment in segments or ()), default=len(x_TD))
        chunk_tokens = default_chunk_tokens(longest, columns, x_TD.dtype, x_TD.device.type)
    runs = tuple(segments or (Segment(len(x_TD), None, z_loss),))
    assert sum(run.tokens for run in runs) == len(x_TD), (runs, x_TD.shape)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
        options = (cast_VD, logit_scale, runs, chunk_tokens, softmax)
        if gradient_sum is None or not weight_VD.requires_grad:
            return _LinearCrossEntropy.apply(x_TD, weight_VD, None, targets_T, *options, None)
        handle: Tensor = _HandOver.apply(weight_VD, gradient_sum, _wide(x_TD))
        return _LinearCrossEntropy.apply(
            x_TD, weight_VD.detach(), handle, targets_T, *options, gradient_sum
        )
    total, nll_T = _empty_sums(x_TD)
    weight = weight_VD.to(x_TD.dtype) if cast_VD is None else cast_VD
    for part, run in _parts(runs, chunk_tokens):
        logits = F.linear(x_TD[part], weight)
        nll_T[part], penalty = softmax.loss(logits, targets_T[part], logit_scale, run.z_loss)
        total += _weighted(nll_T[part].sum() + penalty, run)
    return total, nll_T


def _parts(runs: Sequence[Segment], chunk_tokens: int) -> Iterator[tuple[slice, Segment]]:
    """Cut each run into chunks; yield (place among all tokens, its run)."""
    start = 0
    for run in runs:
        for part in _chunks(run.tokens, chunk_tokens):
            yield slice(start + part.start, start + part.stop), run
        start += run.tokens


def _weighted(loss: Tensor, run: Segment) -> Tensor:
    return loss if run.weight is None else loss * run.weight.to(loss.dtype)


def default_chunk_tokens(tokens: int, vocab_size: int, dtype: torch.dtype, device_type: str) -> int:
    """Return the number of tokens per chunk, a multiple of 128.

    Each chunk reads and writes the complete weight gradient (V x D), so a chunk needs some hundred
    tokens to be bound by arithmetic; beyond that, smaller is better. On a CPU, 8 MiB of logits stay
    in the last-level cache between the passes over them (V = 8192, bf16, 2 cores: 256 and 512
    tokens are fastest, 2048 take 1.3 times as long). A GPU's cache is too small for a useful chunk,
    and its products need thousands of tokens (H100, bf16, compiled: V = 128k and D = 2048 run at
    .60, .77, .92 of the speed of 4096 tokens with 512, 1024, 2048; a model of 125M parameters
    trains 1.05 times as fast with 8192 as with 2000). A GPU's chunk is an eighth of the full
    logits, but at least 256 MiB, which keeps the peak at V = 128k and 4k tokens below a tenth of
    the full logits, and at most 1 GiB. The size is a rule and not measured at run time, so that a
    resumed run sums the same chunks.
    """
    row_bytes = vocab_size * dtype.itemsize
    if device_type == "cpu":
        held = 8 << 20
    else:
        held = min(max(tokens * row_bytes // 8, 256 << 20), 1 << 30)
    return min(max(held // row_bytes // 128 * 128, 128), 8192)


def softmax_gradient_(
    logits_cV: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits_cV`` (before the scale) with the gradient of the chunk's loss.

    Returns (nll_c, z-loss of the chunk). Compiled, one pass reads the logits and one pass writes.
    """
    wide = _wide(logits_cV)
    counted_c = targets_c != IGNORE
    index_c1 = targets_c.where(counted_c, 0)[:, None]
    scaled = logits_cV.to(wide)  # the same storage as the logits if these are wide already
    if logit_scale != 1.0:
        scaled = scaled.mul_(logit_scale)
    target_c = scaled.gather(1, index_c1)[:, 0]
    largest_c1 = scaled.amax(dim=1, keepdim=True)
    exponentials = scaled.sub_(largest_c1).exp_()
    sums_c1 = exponentials.sum(dim=1, keepdim=True)
    log_z_c = (largest_c1 + sums_c1.log())[:, 0]
    nll_c = (log_z_c - target_c).where(counted_c, 0.0)
    penalty = z_loss * log_z_c.square().where(counted_c, 0.0).sum()
    # d/dlogits of -log p(t) + z log²Z is (1 + 2 z log Z) p - onehot(t).
    weight_c = ((1.0 + 2.0 * z_loss * log_z_c) * logit_scale).where(counted_c, 0.0)
    gradient = exponentials.mul_(weight_c[:, None] / sums_c1)
    onehot_c1 = counted_c.to(wide)[:, None] * -logit_scale
    if torch.compiler.is_compiling():
        # A comparison fuses with the pass that writes; a scatter would be a separate kernel.
        column_V = torch.arange(logits_cV.shape[1], device=logits_cV.device)
        gradient = torch.where(column_V == index_c1, gradient + onehot_c1, gradient)
    else:
        gradient = gradient.scatter_add_(1, index_c1, onehot_c1)
    logits_cV.copy_(gradient)
    return nll_c, penalty


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(tokens: int, largest: int) -> Iterator[slice]:
    """Split ``tokens`` into near-equal chunks, at most ``largest``, multiples of 64 if possible."""
    count = max(1, -(-tokens // largest))
    size = min(-(-tokens // (count * 64)) * 64, largest)
    for start in range(0, tokens, size or 1):
        yield slice(start, min(start + size, tokens))


def _empty_sums(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(x_TD)
    return x_TD.new_zeros((), dtype=wide), x_TD.new_zeros(x_TD.shape[0], dtype=wide)


class _HandOver(torch.autograd.Function):
    """Scalar of value 0 whose incoming gradient, the loss factor, scales the weight gradient.

    A separate autograd node: schedules that split backward first call the node of the loss for the
    input gradients, before the gradient sum may be taken.
    """

    @staticmethod
    def forward(
        ctx: Any, weight_VD: Tensor, gradient_sum: GradientSum, wide: torch.dtype
    ) -> Tensor:
        ctx.gradient_sum, ctx.shape, ctx.dtype = gradient_sum, weight_VD.shape, weight_VD.dtype
        return weight_VD.new_zeros((), dtype=wide)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient_sum.take(factor, ctx.shape, ctx.dtype), None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        handle: Tensor | None,
        targets_T: Tensor,
        cast_VD: Tensor | None,
        logit_scale: float,
        runs: tuple[Segment, ...],
        chunk_tokens: int,
        softmax: ChunkSoftmax,
        gradient_sum: GradientSum | None,
    ) -> tuple[Tensor, Tensor]:
        need_x, need_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        total, nll_T = _empty_sums(x_TD)
        weight = weight_VD.to(x_TD.dtype) if cast_VD is None else cast_VD
        grad_x = torch.empty_like(x_TD) if need_x else None
        grad_weight = None if gradient_sum is None else gradient_sum.pending_VD

        # A function, so that a chunk's logits are freed before the next chunk.
        def chunk(part: slice, run: Segment) -> None:
            nonlocal grad_weight, total
            x = x_TD[part]
            logits = F.linear(x, weight)
            targets = targets_T[part]
            nll_T[part], penalty = softmax.gradient_(logits, targets, logit_scale, run.z_loss)
            total += _weighted(nll_T[part].sum() + penalty, run)
            if run.weight is not None:
                logits.mul_(run.weight)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[part])
            if need_weight:
                grad_weight = _accumulate(grad_weight, logits, x, total.dtype)

        for part, run in _parts(runs, chunk_tokens):
            chunk(part, run)
        if gradient_sum is not None:
            gradient_sum.pending_VD, grad_weight = grad_weight, None
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight_VD.dtype)
        elif need_weight:
            grad_weight = torch.zeros_like(weight_VD)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.scaled_by = None
        ctx.mark_non_differentiable(nll_T)
        return total, nll_T

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the gradients belong to this function and are as large as the weight. Schedules
        # that split backward come here twice with one factor, for x and for the weight; the second
        # time the gradients are scaled already. ``data`` bypasses autograd's version check, which
        # would refuse changed tensors; an assert that does not wait for CUDA refuses other factors.
        grads = ctx.saved_tensors
        if ctx.scaled_by is None:
            ctx.scaled_by = grad_total.clone()
            for grad in grads:
                if grad is not None:
                    grad.data.mul_(grad_total)
        else:
            same = "the loss was differentiated before, with another factor"
            torch._assert_async(ctx.scaled_by == grad_total, same)
        handle = grad_total if ctx.needs_input_grad[2] else None
        return *grads, handle, *([None] * 7)


def _accumulate(
    grad_weight: Tensor | None, gradient_cV: Tensor, x_cD: Tensor, wide: torch.dtype
) -> Tensor:
    """Add gradient.T @ x to the weight gradient, which is accumulated in ``wide``."""
    if grad_weight is None:
        return product(gradient_cV.t(), x_cD, wide)
    return add_product_(grad_weight, gradient_cV.t(), x_cD)


def reference_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``linear_cross_entropy`` computed from full logits: the reference implementation."""
    wide = _wide(x_TD)
    logits_TV = F.linear(x_TD, weight_VD.to(x_TD.dtype)).to(wide)
    if logit_scale != 1.0:
        logits_TV = logits_TV * logit_scale
    nll_T = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="none")
    total = nll_T.sum()
    if z_loss:
        counted_T = targets_T != IGNORE
        total = total + z_loss * logits_TV.logsumexp(dim=1).square().where(counted_T, 0.0).sum()
    return total, nll_T.detach()
