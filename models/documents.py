"""Documents packed into sequences, as the model sees them."""

# B sequences, L tokens in a sequence, T = B*L

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Runs of the flattened T tokens that attend to themselves only.

    ``cu_lengths`` int32 [n + 1]: document i is tokens ``cu_lengths[i]`` to ``cu_lengths[i + 1]``;
    it starts with 0, ends with T, never decreases (empty documents are allowed and have no
    effect), and a document lies within one sequence. ``max_length``: tokens of the longest
    document, or more. ``positions_BL``: each token's place in its document, from 0. ``cu_host``:
    ``cu_lengths`` on the CPU, where it is known; without it ``on_cpu`` waits for the device.

    What follows is for documents that several ranks share. ``counted_BL`` (bool; None: all) is
    False for filling, which routers do not see. ``ring`` (int64 on the CPU; None: all of each
    document is here) says who holds the rest; only who made it reads it. ``offload``: share of
    the layers whose kept activations wait for the backward in the host's memory.
    """

    cu_lengths: Tensor
    max_length: int
    positions_BL: Tensor
    counted_BL: Tensor | None = None
    ring: Tensor | None = None
    offload: float = 0.0
    cu_host: Tensor | None = None

    def on_cpu(self) -> Tensor:
        """Return ``cu_lengths`` on the CPU."""
        if self.cu_lengths.device.type == "cpu":
            return self.cu_lengths
        return self.cu_lengths.cpu() if self.cu_host is None else self.cu_host

    def mask(self, window: int | None = None) -> Tensor:
        """Return the causal mask inside documents, bool [B, L, L]: query x key."""
        B, L = self.positions_BL.shape
        tokens = torch.arange(B * L, device=self.cu_lengths.device)
        ids_BL = torch.bucketize(tokens, self.cu_lengths, right=True).view(B, L)
        same_BLL = ids_BL[:, :, None] == ids_BL[:, None, :]
        return same_BLL & causal_mask(L, same_BLL.device, window)


def causal_mask(length: int, device: torch.device, window: int | None = None) -> Tensor:
    """Return bool [L, L], query x key: keys up to the query's own, the last ``window`` of them."""
    seen_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen_LL if window is None else seen_LL.triu(1 - window)
