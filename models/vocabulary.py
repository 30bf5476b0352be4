"""Softmax cross-entropy with the vocabulary sharded over ranks.

The loss exchanges no logits: for each chunk, ranks all-reduce the maxima, then the sums of
exponentials together with the targets' logits (arXiv 1909.08053, section 3).
"""

# c tokens of a chunk, B sequences, L length, V vocabulary, v local columns

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from allometry.models.loss import IGNORE, ChunkSoftmax, row_kernels


class Vocabulary(Protocol):
    """Local shard of the vocabulary, and the reductions over all shards.

    ``first``: number of the first local column. ``columns``: columns of the largest shard, equal on
    all ranks, so that all ranks cut tokens into the same chunks.
    """

    first: int
    columns: int

    def max_(self, values: Tensor) -> None:
        """Replace ``values`` by their maximum over all shards (all-reduce)."""

    def sum_(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all shards (all-reduce)."""

    def gather(self, logits_BLv: Tensor) -> Tensor:
        """Return the logits of all shards [B, L, V], differentiable (all-gather)."""


class SharedSoftmax(ChunkSoftmax):
    """``WholeSoftmax`` for a shard of the columns.

    Exponentials are computed twice instead of being stored in a wide type: one pass reads the
    logits for the shard's maxima and sums (rescaled after the all-reduce of the maxima), a second
    pass reads the logits and writes the gradient. ``compile`` compiles both torch passes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._scan, self._write_ = _scan, _write_

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the passes over the logits; the arguments are passed to ``torch.compile``."""
        self._scan = torch.compile(_scan, *args, **kwargs)
        self._write_ = torch.compile(_write_, *args, **kwargs)

    @override
    def columns(self, weight_vD: Tensor) -> int:
        return self.vocabulary.columns

    @override
    def gradient_(
        self, logits_cv: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        own_c = targets_c - self.vocabulary.first
        largest_c, sums_c, target_c = self._statistics(logits_cv, own_c, logit_scale)
        log_z_c, counted_c = largest_c + sums_c.log(), targets_c != IGNORE
        # d/dlogits of -log p(t) + z log²Z is (1 + 2 z log Z) p - onehot(t).
        weight_c = ((1.0 + 2.0 * z_loss * log_z_c) * logit_scale).where(counted_c, 0.0) / sums_c
        kernels = row_kernels(logits_cv)
        write_ = self._write_ if kernels is None else kernels.write_
        write_(logits_cv, own_c, largest_c, weight_c, logit_scale)
        return _loss(log_z_c, target_c, counted_c, z_loss)

    @override
    def loss(
        self, logits_cv: Tensor, targets_c: Tensor, logit_scale: float, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        own_c = targets_c - self.vocabulary.first
        largest_c, sums_c, target_c = self._statistics(logits_cv, own_c, logit_scale)
        return _loss(largest_c + sums_c.log(), target_c, targets_c != IGNORE, z_loss)

    def _statistics(
        self, logits_cv: Tensor, own_c: Tensor, logit_scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return maxima, sums of exp(logit - maximum) and targets' logits, over all shards."""
        assert logit_scale > 0.0, logit_scale
        kernels = row_kernels(logits_cv)
        scan = self._scan if kernels is None else kernels.scan
        part_c, sums_c, target_c = scan(logits_cv, own_c, logit_scale)
        largest_c = part_c.clone()
        self.vocabulary.max_(largest_c)
        both_2c = torch.stack([sums_c * (part_c - largest_c).exp(), target_c])
        self.vocabulary.sum_(both_2c)
        sums_c, target_c = both_2c.unbind()
        return largest_c, sums_c, target_c


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _scan(logits_cv: Tensor, own_c: Tensor, logit_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return maxima, sums of exp(logit - maximum), targets' logits (0 on other ranks), each [c]."""
    scaled_cv = logits_cv.to(_wide(logits_cv)) * logit_scale
    here_c = (own_c >= 0) & (own_c < logits_cv.shape[1])
    index_c1 = own_c.where(here_c, 0)[:, None]
    target_c = scaled_cv.gather(1, index_c1)[:, 0].where(here_c, 0.0)
    largest_c = scaled_cv.amax(dim=1)
    sums_c = scaled_cv.sub_(largest_c[:, None]).exp_().sum(dim=1)
    return largest_c, sums_c, target_c


def _write_(
    logits_cv: Tensor, own_c: Tensor, largest_c: Tensor, weight_c: Tensor, logit_scale: float
) -> None:
    """Write weight * exponential - scale * onehot over the logits; IGNORE matches no column."""
    wide = _wide(logits_cv)
    scaled_cv = logits_cv.to(wide) * logit_scale
    here_c = (own_c >= 0) & (own_c < logits_cv.shape[1])
    gradient_cv = scaled_cv.sub_(largest_c[:, None]).exp_().mul_(weight_c[:, None])
    if torch.compiler.is_compiling():
        # A comparison fuses with the pass that writes; a scatter would be a separate kernel.
        column_v = torch.arange(logits_cv.shape[1], device=logits_cv.device)
        onehot_cv = column_v == own_c[:, None]
        gradient_cv = torch.where(onehot_cv, gradient_cv - logit_scale, gradient_cv)
    else:
        onehot_c1 = here_c.to(wide)[:, None] * -logit_scale
        gradient_cv.scatter_add_(1, own_c.where(here_c, 0)[:, None], onehot_c1)
    logits_cv.copy_(gradient_cv)


def _loss(
    log_z_c: Tensor, target_c: Tensor, counted_c: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    penalty = z_loss * log_z_c.square().where(counted_c, 0.0).sum()
    return (log_z_c - target_c).where(counted_c, 0.0), penalty
