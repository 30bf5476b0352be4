"""Multi-token prediction: additional blocks predict tokens beyond the next one during training.

Depth k = 1..M (DeepSeek-V3, arXiv 2412.19437, section 2.2, eq. 21-25) computes for token i::

    h' = W_k [norm_e(Emb(t_{i+k})); norm_h(h^{k-1}_i)]
    h^k = Block_k(h')
    Head(norm_k(h^k_i)) predicts t_{i+k+1}

    L = L_main + weight / M * sum_k L_k

The embedding and the head are shared with the main model. As in Ling 2.0 (arXiv 2510.22115 and its
published code), h^0 is the main model's output after the final norm, and the embedding is the first
half of W_k's input. DeepSeek-V3's paper writes [hidden; embedding], with h^0 before the final norm.
"""

# B sequences, L tokens, D width, M depths

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allometry.configs.model import ModelConfig
from allometry.models.documents import Documents
from allometry.models.layers import Embedding, Linear, RMSNorm
from allometry.models.loss import IGNORE
from allometry.scaling.inventory import Specs, within


class Depth(nn.Module):
    """Parameters of a depth in addition to its block: three norms and the projection W_k."""

    def __init__(self, specs: Specs, model: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(specs["embedding_norm.weight"], model.norm_eps)
        self.hidden_norm = RMSNorm(specs["hidden_norm.weight"], model.norm_eps)
        self.projection = Linear(specs["projection.weight"])
        self.final_norm = RMSNorm(specs["final_norm.weight"], model.norm_eps)

    def forward(self, embedded_BLD: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Return the block's input [B, L, D] from embeddings after their norm and h^{k-1}."""
        both = embedded_BLD, self.hidden_norm(hidden_BLD)
        projected: Tensor = self.projection(torch.cat(both, dim=-1))
        return projected


class _Together(torch.autograd.Function):
    """Identity of several tensors with a single autograd node.

    Schedules that split the backward collect the gradient of each parameter at the first nodes that
    the stage's input reaches as well. The embedding would have one such node per depth, each behind
    the blocks of the depths before; with this node it has one, before all of them.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class Depths(nn.ModuleDict):
    """The M depths of the part with the head, by number; their blocks are the part's last blocks.

    A part without the embedding has a copy of it, ``embedding``, which the code that splits the
    model must keep equal. ``first``: the layer number of the first depth's block. A target of depth
    k has the weight ``weight`` / M * T / T_k, where T and T_k are the numbers of targets of the
    main loss and of depth k in the step's global batch, because the caller divides the total loss
    by T. The weights are NaN until ``set_targets``. ``comparing``: forward passes without gradients
    run the depths as well, for ``take_drafts``.
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
        self._compared: Tensor | None = None
        self.comparing = False

    def inputs(self, ahead_MBL: Tensor) -> list[Tensor]:
        """Return the tokens [B, L] that each depth looks up.

        Token 0 replaces missing tokens; the loss there is not counted.
        """
        return list(ahead_MBL[:-1].where(ahead_MBL[:-1] != IGNORE, 0).unbind())

    def joined(self, hidden_BLD: Tensor, embedded: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return h^0 and each depth's embeddings after their norms, [B, L, D]."""
        normed = [self[str(k)].embedding_norm(x_BLD) for k, x_BLD in enumerate(embedded)]
        made: tuple[Tensor, ...] = _Together.apply(hidden_BLD, *normed)
        return made

    def set_targets(self, targets_K: Tensor) -> None:
        """Set the numbers of targets in the global batch: of the main loss, of depth 1, 2, ..."""
        counts_K = targets_K.double()
        ratios = counts_K[0].clamp(min=1.0) / counts_K[1:].clamp(min=1.0)
        self.weights.copy_(self.weight * ratios)

    @torch.no_grad()
    def observe(self, nll: Sequence[Tensor], targets_MBL: Tensor) -> None:
        """Add the depths' losses [B, L] to the next result of ``take``."""
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

    def compare(self, main_BL: Tensor, drafts_BL: Tensor, counted_BL: Tensor) -> None:
        """Count drafts of depth 1 that equal the main head's most likely token.

        The draft at position i and ``main_BL`` at position i + 1 predict the same token. The last
        position of a rank's part of a document is not compared.
        """
        same_BL = drafts_BL == main_BL.flatten().roll(-1).view_as(main_BL)
        numbers = torch.stack([(same_BL & counted_BL).sum(), counted_BL.sum()]).double()
        self._compared = numbers if self._compared is None else self._compared + numbers

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Run the depths in the context's forward passes without gradients, too."""
        self.comparing = True
        try:
            yield
        finally:
            self.comparing = False

    def take_drafts(self) -> Tensor:
        """Return numbers of equal and of all compared drafts since the last call, [2] in fp64."""
        taken, self._compared = self._compared, None
        return self.weights.new_zeros(2) if taken is None else taken


def followed(targets_BL: Tensor, documents: Documents | None) -> Tensor:
    """Return True where the next position [B, L] is of the same document and on this rank."""
    B, L = targets_BL.shape
    ends_T = _ends(targets_BL, documents)
    ends_T = F.pad(ends_T, (0, B * L - len(ends_T)))  # padding after parts of documents
    return (torch.arange(1, B * L + 1, device=targets_BL.device) < ends_T).view(B, L)


def ahead_of(targets_BL: Tensor, documents: Documents | None, depths: int) -> Tensor:
    """Return the tokens 1, 2, ... M + 1 ahead of each token, [M + 1, B, L].

    Depth k reads the k-th of them and predicts the next one. ``IGNORE`` marks tokens beyond the end
    of the document or of the row: a document of k + 1 tokens or fewer has no target of depth k. A
    rank has only a part of documents that several ranks share; ``trainer/feed.py`` reads the tokens
    ahead of that part. For example, ``ahead_of(targets, None, 1)[1]`` are the targets of depth 1.
    """
    B, L = targets_BL.shape
    assert documents is None or documents.ring is None, "parts of documents that ranks share"
    ends_T = _ends(targets_BL, documents)
    places_T = torch.arange(B * L, device=targets_BL.device)
    flat_T = targets_BL.flatten()
    found = [targets_BL]
    for depth in range(1, depths + 1):
        there = places_T + depth < ends_T
        at = (places_T + depth).clamp(max=B * L - 1)
        found.append(flat_T[at].where(there, IGNORE).view(B, L))
    return torch.stack(found)


def _ends(targets_BL: Tensor, documents: Documents | None) -> Tensor:
    """Return the end of each token's document, or of its part on this rank, among all tokens."""
    B, L = targets_BL.shape
    if documents is None:
        return torch.arange(1, B + 1, device=targets_BL.device).repeat_interleave(L) * L
    ends = documents.cu_lengths.long()
    size = B * L if documents.ring is None else None
    return ends[1:].repeat_interleave(ends.diff(), output_size=size)
