"""Micro-batches without targets, for ranks that must join the collectives of other ranks."""

# B sequences of a micro-batch, L tokens in a sequence

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from allometry.models.documents import Documents
from allometry.models.loss import IGNORE

TOKENS = 8
"""Length of a filling micro-batch: small, but not one, which compilers specialize."""


@dataclass(frozen=True)
class Filling:
    """Tokens without targets, which routers do not count."""

    tokens_BL: Tensor
    targets_BL: Tensor
    documents: Documents
    ahead_MBL: None = None

    @classmethod
    def of(cls, device: torch.device, multiple: int = 1) -> Filling:
        """Build a filling micro-batch whose length is a multiple of ``multiple`` (tp)."""
        length = TOKENS * multiple
        tokens_BL = torch.zeros(1, length, dtype=torch.int64, device=device)
        documents = Documents(
            cu_lengths=torch.tensor([0, length], dtype=torch.int32, device=device),
            max_length=length,
            positions_BL=torch.arange(length, device=device)[None],
            counted_BL=torch.zeros(1, length, dtype=torch.bool, device=device),
            cu_host=torch.tensor([0, length], dtype=torch.int32),
        )
        return cls(tokens_BL, torch.full_like(tokens_BL, IGNORE), documents)
