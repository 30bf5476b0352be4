"""Softmax and its gradient where each rank holds some columns of the logits.

Nothing as large as the vocabulary is ever exchanged: a chunk's maxima, then the sums of its
exponentials with the targets' logits (arXiv 1909.08053, section 3).
"""

# c tokens of a chunk, B sequences, L length, V vocabulary, v columns of it that are here

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from allometry.models.loss import IGNORE, ChunkSoftmax, row_kernels


class Vocabulary(Protocol):
    """Which columns are here, and how all parts of a vocabulary are combined.

    ``first``: the number of the first column that is here; ``columns``: of the largest part, the
    same number wherever a part is, so that all cut tokens into the same chunks.
    """

    first: int
    columns: int

    def max_(self, values: Tensor) -> None:
        """Replace ``values`` by their maximum over all parts."""

    def sum_(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all parts."""

    def gather(self, logits_BLv: Tensor) -> Tensor:
        """Return the logits of all parts [B, L, V], differentiable."""


class SharedSoftmax(ChunkSoftmax):
    """``WholeSoftmax`` on a part of the columns.

    Exponentials are computed twice rather than kept in a wide type: a pass reads the logits for
    maxima and sums of the part (which the exchanged maxima then scale), another reads and writes.
    ``compile`` compiles both, where torch computes them.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._scan, self._write_ = _scan, _write_

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the passes over the logits with these options of ``torch.compile``."""
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
        """Return maxima, sums of exponentials above them and targets' logits, over all parts."""
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
    """Return maxima, sums of exponentials above them, targets' logits (0 where elsewhere), [c]."""
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
    """Write weight * exponential - scale * onehot over the logits; no column is IGNORE."""
    wide = _wide(logits_cv)
    scaled_cv = logits_cv.to(wide) * logit_scale
    here_c = (own_c >= 0) & (own_c < logits_cv.shape[1])
    gradient_cv = scaled_cv.sub_(largest_c[:, None]).exp_().mul_(weight_c[:, None])
    if torch.compiler.is_compiling():
        # As a comparison it fuses with the pass that writes; a scatter is its own.
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
