"""Kernels of a model that a run may choose: attention's back end and RMSNorm's."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from allometry.models.attention import attend_by
from allometry.models.layers import RMSNorm
from allometry.models.transformer import Transformer


def use_kernels(model: Transformer, attention: str | None = None, norm: str = "torch") -> None:
    """Let a model that nothing has wrapped yet compute with these kernels.

    ``attention``: a name in ``scaling.attention.BACKENDS``, None: the first that suits each call;
    ``norm``: a name in ``NORMS``.
    """
    core = attend_by(attention)
    for block in model.blocks.values():
        block.attention.core = core
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.rms_norm = NORMS[norm]


def _apex(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, shape, eps)


NORMS: dict[str, Callable[[Tensor, tuple[int, ...], Tensor, float], Tensor]] = {
    "torch": F.rms_norm,
    "apex": _apex,
}
"""RMSNorm's kernels: (x, normalised shape, weight, eps) -> as x."""
