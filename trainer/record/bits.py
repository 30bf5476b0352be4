"""Sums over the bits of tensors, which tell whether two of them are equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = 1 << 20  # of a piece that is summed at once: 8 MiB
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit is lost


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a sum over the bits of a tensor, 0-dim int64 on its device; nothing waits for it.

    Words of 64 bits are weighted by odd numbers modulo 2^64, so that a change of any one word
    changes it, and others go unseen with a chance of about 2^-64. The order in which a device adds
    does not matter.
    """
    flat = tensor.detach().contiguous().flatten()
    if not flat.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    octets = flat.view(torch.uint8)
    rest = octets.numel() % 8
    if rest or octets.storage_offset() % 8:
        octets = torch.cat([octets, octets.new_zeros(-octets.numel() % 8)])
    words = octets.view(torch.int64)
    weights = torch.arange(
        1, 2 * min(words.numel(), _WORDS), 2, dtype=torch.int64, device=words.device
    )
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in words.split(_WORDS):
        total = total * _FACTOR + (piece * weights[: piece.numel()]).sum()
    return total


def combined(sums: Sequence[Tensor]) -> Tensor:
    """Return one checksum of several, in their order."""
    return checksum(torch.stack(list(sums)))
