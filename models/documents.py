"""Packed documents: boundaries, positions and causal masks."""

# B sequences, L tokens in a sequence, T = B*L

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Document boundaries in the flattened T tokens; attention stays inside a document.

    ``cu_lengths`` int32 [n + 1]: document i is tokens ``cu_lengths[i]`` to ``cu_lengths[i + 1]``.
    ``cu_lengths`` starts with 0, ends with T and never decreases (empty documents are allowed and
    have no effect); a document never crosses a sequence. ``max_length``: an upper bound on the
    tokens of a document. ``positions_BL``: position of each token in its document, from 0.
    ``cu_host``: a copy of ``cu_lengths`` on the CPU, if known; without ``cu_host``, ``on_cpu``
    waits for the device. For example, documents of 3 and 5 tokens in one sequence of 8 have
    ``cu_lengths`` [0, 3, 8] and ``positions_BL`` [[0, 1, 2, 0, 1, 2, 3, 4]].

    The other fields are for documents sharded over several ranks. ``counted_BL`` (bool; None: all
    True) is False for padding, which routers ignore. ``ring`` (int64 on the CPU; None: each
    document is complete on this rank) is the table of ring attention with the ranks that share the
    documents; only the code that made ``ring`` reads it. ``offload``: fraction of the layers whose
    saved activations are offloaded to host memory until backward.
    """

    cu_lengths: Tensor
    max_length: int
    positions_BL: Tensor
    counted_BL: Tensor | None = None
    ring: Tensor | None = None
    offload: float = 0.0
    cu_host: Tensor | None = None

    def on_cpu(self) -> Tensor:
        """Return ``cu_lengths`` on the CPU; waits for the device unless ``cu_host`` is set."""
        if self.cu_lengths.device.type == "cpu":
            return self.cu_lengths
        return self.cu_lengths.cpu() if self.cu_host is None else self.cu_host

    def mask(self, window: int | None = None) -> Tensor:
        """Return the causal mask inside documents and ``window``, bool [B, L, L]: query x key."""
        B, L = self.positions_BL.shape
        tokens = torch.arange(B * L, device=self.cu_lengths.device)
        ids_BL = torch.bucketize(tokens, self.cu_lengths, right=True).view(B, L)
        same_BLL = ids_BL[:, :, None] == ids_BL[:, None, :]
        return same_BLL & causal_mask(L, same_BLL.device, window)


def causal_mask(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """Return bool [L, L], query x key: query i sees keys i - window + 1 to i (None: 0 to i)."""
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen_LL if window is None else seen_LL.triu(1 - window)
