"""Output head: logits, or the loss without materialising all logits."""

# B batch, L length, T = B*L, D width, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.model import ModelConfig
from allometry.models.loss import (
    GradientSum,
    Segment,
    WholeSoftmax,
    default_chunk_tokens,
    linear_cross_entropy,
)
from allometry.models.parameters import OwnsParameters
from allometry.models.products import Stacked
from allometry.models.vocabulary import SharedSoftmax, Vocabulary
from allometry.scaling.roles import ParamSpec


class Losses(NamedTuple):
    """Loss of a batch.

    ``total``: sum over target tokens, z-loss included, to be divided by the global token count.
    ``nll_BL``: -log p of each target, without gradient, 0 where the target is ignored. Both are
    fp32, or fp64 if the model computes in fp64.
    """

    total: Tensor
    nll_BL: Tensor


class OutputHead(OwnsParameters):
    """Output layer; returns logits or the loss.

    ``weight`` is None if the head is ``tied`` to the embedding, which then owns the parameter;
    products read the weight through ``stacked``. ``compile`` compiles only the softmax of a chunk:
    matrix products gain nothing, and the loop over chunks would be unrolled into one large graph.
    ``softmax`` is ``SharedSoftmax`` if the weight here is a shard of the vocabulary.
    ``gradient_sum`` is set by pipeline schedules that run several forwards before a backward.
    ``StackedModel`` replaces ``cross_entropy``.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        spec: ParamSpec | None,
        model: ModelConfig,
        scale: float,
        tied: OwnsParameters | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.z_loss, self.vocab_size = scale, model.z_loss, model.vocab_size
        self.softmax: WholeSoftmax | SharedSoftmax = WholeSoftmax()
        self.gradient_sum: GradientSum | None = None
        self.cross_entropy: Callable[..., tuple[Tensor, Tensor]] = linear_cross_entropy
        if spec is None:
            assert tied is not None
            self.register_parameter("weight", None)
        else:
            self.own("weight", spec)
        self.stacked = Stacked((self if tied is None else tied, "weight"))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the loss; the arguments are passed to ``torch.compile``."""
        self.softmax.compile(*args, **kwargs)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Shard of the vocabulary on this rank; None if the weight covers all of it."""
        return self.softmax.vocabulary if isinstance(self.softmax, SharedSoftmax) else None

    def forward(
        self,
        x_BLD: Tensor,
        targets_BL: Tensor | None = None,
        weights_K: Tensor | None = None,
        *,
        choose: bool = False,
    ) -> Tensor | Losses:
        """Return logits [B, L, V] (fp32 or wider), or ``Losses`` if targets are given.

        ``weights_K``: x and targets are 1 + K batches in a row, [(1 + K) B, L]; ``total`` includes
        the losses of batch k > 0 times ``weights_K[k - 1]`` and without z-loss. ``choose``: return
        the most likely tokens [B, L] instead, without gradients.
        """
        if choose:
            return self._most_likely(x_BLD)
        if targets_BL is None:
            logits_BLV = F.linear(x_BLD, self.stacked.joined(x_BLD.dtype))
            if self.vocabulary is not None:
                logits_BLV = self.vocabulary.gather(logits_BLV)
            wide = torch.promote_types(x_BLD.dtype, torch.float32)
            return logits_BLV.to(wide) * self.scale
        more: dict[str, Any] = {}
        if weights_K is not None:
            tokens = targets_BL.numel() // (1 + len(weights_K))
            ahead = [Segment(tokens, weight, 0.0) for weight in weights_K.unbind()]
            more["segments"] = [Segment(tokens, None, self.z_loss), *ahead]
        total, nll_T = self.cross_entropy(
            x_BLD.flatten(0, 1),
            *self.stacked.weights(),
            targets_BL.flatten(),
            cast_VD=self.stacked.copy,
            logit_scale=self.scale,
            z_loss=self.z_loss,
            softmax=self.softmax,
            gradient_sum=self.gradient_sum,
            **more,
        )
        return Losses(total, nll_T.view(targets_BL.shape))

    @torch.no_grad()
    def _most_likely(self, x_BLD: Tensor) -> Tensor:
        weight, x_TD = self.stacked.joined(x_BLD.dtype), x_BLD.flatten(0, 1)
        columns = self.softmax.columns(weight)
        chunk = default_chunk_tokens(len(x_TD), columns, x_TD.dtype, x_TD.device.type)
        chosen = []
        for x_cD in x_TD.split(chunk):
            logits_1cV = F.linear(x_cD, weight)[None]
            if self.vocabulary is not None:
                logits_1cV = self.vocabulary.gather(logits_1cV)
            chosen.append(logits_1cV[0].argmax(dim=1))
        return torch.cat(chosen).view(x_BLD.shape[:2])
