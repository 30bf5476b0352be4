"""The end of a model: logits, or the loss without ever holding all logits."""

# B batch, L length, T = B*L, D width, V vocabulary

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.model import ModelConfig
from allometry.models.declare import DeclaresRoles
from allometry.models.layers import local, unset
from allometry.models.loss import ChunkGradient, linear_cross_entropy, softmax_gradient_
from allometry.models.vocabulary import SharedSoftmax
from allometry.scaling.roles import Role


class Losses(NamedTuple):
    """``total``: the sum over target tokens, z-loss included, to be divided by the global count.

    ``nll_BL``: -log p of each target, without gradient, 0 where it is ignored. Both are fp32, or
    fp64 where the model computes in fp64.
    """

    total: Tensor
    nll_BL: Tensor


class OutputHead(DeclaresRoles):
    """Logits or loss. ``weight`` is None where the embedding is the head: it is then passed in.

    ``compile`` compiles the softmax of a chunk only: matrix products gain nothing, and a loop
    over chunks would be unrolled into one large graph. ``shared``, where it is set, says which
    part of the vocabulary the weight here is.
    """

    weight: nn.Parameter | None

    def __init__(self, model: ModelConfig, scale: float, *, tied: bool) -> None:
        super().__init__()
        self.scale, self.z_loss, self.vocab_size = scale, model.z_loss, model.vocab_size
        self.chunk_gradient: ChunkGradient = softmax_gradient_
        self.shared: SharedSoftmax | None = None
        if tied:
            self.register_parameter("weight", None)
        else:
            weight = unset(model.vocab_size, model.width)
            self.declare("weight", weight, Role.OUTPUT, fan_in=model.width, fan_out=len(weight))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the loss with these options of ``torch.compile``."""
        if self.shared is not None:
            self.shared.compile(*args, **kwargs)
            return
        self.chunk_gradient = torch.compile(softmax_gradient_, *args, **kwargs)

    def forward(
        self, x_BLD: Tensor, targets_BL: Tensor | None, tied_VD: Tensor | None
    ) -> Tensor | Losses:
        """Return logits [B, L, V] (fp32 or wider), or with targets the losses."""
        weight_VD = self.weight if tied_VD is None else tied_VD
        assert weight_VD is not None
        weight_VD = local(weight_VD)
        if targets_BL is None:
            logits_BLV = F.linear(x_BLD, weight_VD.to(x_BLD.dtype))
            if self.shared is not None:
                logits_BLV = self.shared.vocabulary.gather(logits_BLV)
            wide = torch.promote_types(x_BLD.dtype, torch.float32)
            return logits_BLV.to(wide) * self.scale
        total, nll_T = linear_cross_entropy(
            x_BLD.flatten(0, 1),
            weight_VD,
            targets_BL.flatten(),
            logit_scale=self.scale,
            z_loss=self.z_loss,
            chunk_gradient=self.chunk_gradient,
            shared=self.shared,
        )
        return Losses(total, nll_T.view(targets_BL.shape))
