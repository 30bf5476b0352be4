"""Compute checksums over the bits of tensors, to test tensors for bitwise equality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORDS = 1 << 20  # of a piece that is summed at once: 8 MiB
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no bit is lost


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a checksum of a tensor's bits, 0-dim int64 on its device, without synchronizing.

    Words of 64 bits are weighted by odd numbers modulo 2^64, so that a change of any single word
    changes the checksum, and other changes are missed with a probability of about 2^-64. The order
    of additions on the device does not matter.
    """
    octets = tensor.detach().contiguous().flatten().view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=octets.device)
    most = min(-(-octets.numel() // 8), _WORDS)
    weights = torch.arange(1, 2 * most + 1, 2, dtype=torch.int64, device=octets.device)
    for piece in octets.split(8 * _WORDS):
        if piece.numel() % 8 or piece.storage_offset() % 8:  # part of a larger buffer
            piece = torch.cat([piece, piece.new_zeros(-piece.numel() % 8)])
        words = piece.view(torch.int64)
        total = total * _FACTOR + (words * weights[: words.numel()]).sum()
    return total


def combined(sums: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return one checksum of several, in their order, on ``device``."""
    return checksum(torch.stack([one.to(device) for one in sums]))
