"""Host memory that disks and GPUs can access directly."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

BLOCK = 4096
"""Alignment in bytes that ``O_DIRECT`` requires of buffers, offsets and sizes."""


def padded(nbytes: int) -> int:
    """Return ``nbytes`` rounded up to a multiple of ``BLOCK``; for example, 5000 gives 8192."""
    return -(-nbytes // BLOCK) * BLOCK


def host_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Return zeros, uint8 [nbytes], aligned to ``BLOCK``, and page-locked if ``device`` is a GPU.

    The buffer is registered by hand because torch's pinned allocator rounds sizes up to a power of
    two.
    """
    raw = torch.zeros(nbytes + BLOCK, dtype=torch.uint8)
    buffer = raw[-raw.data_ptr() % BLOCK :][:nbytes]
    if device.type == "cuda" and nbytes:
        cudart, address = torch.cuda.cudart(), buffer.data_ptr()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, 0))
        # The finalizer is attached to the storage, which outlives this view.
        weakref.finalize(raw.untyped_storage(), cudart.cudaHostUnregister, address)
    return buffer
