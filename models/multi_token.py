"""Multi-token prediction: what a model predicts beyond the next token, in training alone.

Depth k = 1..M (DeepSeek-V3, arXiv 2412.19437, section 2.2), for token i::

    h' = W_k [norm_e(Emb(t_{i+k})); norm_h(h^{k-1}_i)]
    h^k = Block_k(h')
    Head(norm_k(h^k_i)) predicts t_{i+k+1}

Embedding and head are the model's own. h^0 is what its head reads, after the final norm, and the
embedding comes first, as Ling 2.0 has it (arXiv 2510.22115).
"""

# B sequences, L tokens, D width, M depths

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from allometry.configs.model import ModelConfig
from allometry.models.documents import Documents
from allometry.models.layers import Embedding, Linear, RMSNorm
from allometry.models.loss import IGNORE
from allometry.scaling.inventory import Specs, within


class Depth(nn.Module):
    """What a depth has beside its block: two norms, the projection of both, and a norm after it."""

    def __init__(self, specs: Specs, model: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(specs["embedding_norm.weight"], model.norm_eps)
        self.hidden_norm = RMSNorm(specs["hidden_norm.weight"], model.norm_eps)
        self.projection = Linear(specs["projection.weight"])
        self.final_norm = RMSNorm(specs["final_norm.weight"], model.norm_eps)

    def forward(self, embedded_BLD: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Return what the depth's block reads, [B, L, D]."""
        both = self.embedding_norm(embedded_BLD), self.hidden_norm(hidden_BLD)
        projected: Tensor = self.projection(torch.cat(both, dim=-1))
        return projected


class Depths(nn.ModuleDict):
    """The M depths of a part with the head, by number, beside their blocks.

    A part without the embedding has a copy of it, ``embedding``, which whoever parted them keeps
    equal. ``first``: the layer of the first depth's block. Losses of depth k count
    weight / M x T / T_k for each target, T and T_k being the targets in the step's global batch, as
    the caller divides the total by T: NaN until ``set_targets``.
    """

    weights: Tensor

    def __init__(
        self, specs: Specs, model: ModelConfig, compute_dtype: torch.dtype, *, mirrored: bool
    ) -> None:
        super().__init__()
        assert model.multi_token is not None
        self.number, self.first = model.num_depths, model.num_layers
        self.weight = model.multi_token.weight / self.number
        if mirrored:
            self["embedding"] = Embedding(specs["mtp.embedding.weight"], compute_dtype)
        for depth in range(self.number):
            self[str(depth)] = Depth(within(specs, f"mtp.{depth}"), model)
        unset = torch.full((self.number,), float("nan"), dtype=torch.float64)
        self.register_buffer("weights", unset, persistent=False)
        self._seen: Tensor | None = None

    def inputs(self, ahead_MBL: Tensor) -> list[Tensor]:
        """Return the tokens [B, L] that each depth looks up.

        What is not there is a token like any other, whose loss does not count.
        """
        return list(ahead_MBL[:-1].where(ahead_MBL[:-1] != IGNORE, 0).unbind())

    def set_targets(self, targets_K: Tensor) -> None:
        """Say how many targets the step's global batch has: of the main loss, of depth 1, 2, ..."""
        counts_K = targets_K.double()
        ratios = counts_K[0].clamp(min=1.0) / counts_K[1:].clamp(min=1.0)
        self.weights.copy_(self.weight * ratios)

    @torch.no_grad()
    def observe(self, nll: Sequence[Tensor], targets_MBL: Tensor) -> None:
        """Add to what ``take`` returns next."""
        seen = torch.stack(
            [
                torch.stack([nll_BL.double().sum(), (targets_BL != IGNORE).double().sum()])
                for nll_BL, targets_BL in zip(nll, targets_MBL, strict=True)
            ]
        )
        self._seen = seen if self._seen is None else self._seen + seen

    def take(self) -> Tensor:
        """Return sums of losses and numbers of targets since the last call, [M, 2] in fp64."""
        taken, self._seen = self._seen, None
        return torch.zeros_like(self.weights)[:, None].expand(-1, 2) if taken is None else taken


def ahead_of(targets_BL: Tensor, documents: Documents | None, depths: int) -> Tensor:
    """Return the tokens 1, 2, ... M + 1 ahead of each, [M + 1, B, L], IGNORE where there is none.

    Depth k reads the k-th of them and predicts the next one. Nothing is ahead of a token beyond the
    end of its document, or of its row; a document of k + 1 tokens or fewer has no target of depth
    k. Of documents that several ranks share each has a part: ``trainer/feed.py`` reads what is
    ahead of these.
    """
    B, L = targets_BL.shape
    assert documents is None or documents.ring is None, "parts of documents that ranks share"
    if documents is None:
        ends_T = torch.arange(1, B + 1, device=targets_BL.device).repeat_interleave(L) * L
    else:
        ends = documents.cu_lengths.long()
        ends_T = ends[1:].repeat_interleave(ends.diff(), output_size=B * L)
    places_T = torch.arange(B * L, device=targets_BL.device)
    flat_T = targets_BL.flatten()
    found = [targets_BL]
    for depth in range(1, depths + 1):
        there = places_T + depth < ends_T
        at = (places_T + depth).clamp(max=B * L - 1)
        found.append(flat_T[at].where(there, IGNORE).view(B, L))
    return torch.stack(found)
