"""Memory of the host that disks and GPUs read directly."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

BLOCK = 4096
"""Bytes: what ``O_DIRECT`` wants buffers, offsets and sizes to be multiples of."""


def padded(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Return zeros, uint8 [nbytes], that begin at a block; locked for a GPU's ``device``.

    torch's own pinned memory would round a buffer up to a power of two.
    """
    raw = torch.zeros(nbytes + BLOCK, dtype=torch.uint8)
    buffer = raw[-raw.data_ptr() % BLOCK :][:nbytes]
    if device.type == "cuda" and nbytes:
        cudart, address = torch.cuda.cudart(), buffer.data_ptr()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
        # With the storage, not with this view of it.
        weakref.finalize(raw.untyped_storage(), cudart.cudaHostUnregister, address)
    return buffer
