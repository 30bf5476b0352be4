"""Selection of a model's kernels: attention back end, RMSNorm, and rounding to FP8."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from allometry.models.attention import attend_by
from allometry.models.layers import RMSNorm
from allometry.models.moe import MoEFeedForward
from allometry.models.products import Stacked
from allometry.models.router import Router
from allometry.models.transformer import FeedForward, Transformer


def use_kernels(
    model: Transformer, attention: str | None = None, norm: str = "torch", quantise: str = "torch"
) -> None:
    """Set the kernels of a model; call before the model is wrapped, compiled or sharded.

    ``attention``: a name in ``scaling.attention.BACKENDS``; None selects the first back end that
    supports each call. ``norm``: a name in ``NORMS``. ``quantise``: "torch" or "triton". With
    "triton" and ``norm="torch"``, one kernel computes RMSNorm and rounds its output; the output of
    any other norm is rounded by a separate kernel. For example,
    ``use_kernels(model, attention="flash2", quantise="triton")``.
    """
    core = attend_by(attention)
    for block in model.blocks.values():
        block.attention.core = core
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.rms_norm = NORMS[norm]
            module.fused = quantise == "triton" and norm == "torch"
    if quantise != "triton":
        return
    for block in model.blocks.values():
        if isinstance(block.attention_norm, RMSNorm):
            block.attention_norm.feeds = block.attention.qkv
        wide = block.ffn.shared if isinstance(block.ffn, MoEFeedForward) else block.ffn
        if isinstance(wide, FeedForward) and isinstance(block.ffn_norm, RMSNorm):
            block.ffn_norm.feeds = wide.gate_up
        for module in block.modules():
            if isinstance(module, Router):
                module.fused = True
            for stacked in vars(module).values():
                if isinstance(stacked, Stacked):
                    stacked.fused = True


def _apex(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return fused_rms_norm_affine(x, weight, shape, eps)


NORMS: dict[str, Callable[[Tensor, tuple[int, ...], Tensor, float], Tensor]] = {
    "torch": F.rms_norm,
    "apex": _apex,
}
"""RMSNorm kernels by name: (x, normalised shape, weight, eps) -> output in x's shape and type."""
