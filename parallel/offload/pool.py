"""Host memory for activations, allocated during the first step and then reused."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from allometry.parallel.buffers import host_buffer

SLAB_BYTES, FIRST_BYTES = 256 * 2**20, 4 * 2**20
_ALIGNMENT = 512


class Region(NamedTuple):
    """Part of a slab: ``memory`` is uint8; ``size`` is the reserved size, with alignment."""

    memory: Tensor
    slab: int
    start: int
    size: int


class HostPool:
    """Allocator of regions in large slabs, page-locked if ``device`` is a GPU.

    A region is taken from the first slab with room, at its lowest address, and adjacent free
    regions are merged. Equal steps thus reuse the addresses of the first step without new
    allocations. A request larger than a slab gets a slab of its own. Slabs live as long as the
    pool. A new slab is as large as all slabs before, up to ``slab_bytes``, so a small model
    reserves little memory.
    """

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        self._device, self._slab_bytes = device, slab_bytes
        self._slabs: list[Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # by slab: (start, stop), ascending
        # Any thread may release a graph at any time, even during ``take``.
        self._returned: deque[Region] = deque()

    @property
    def allocations(self) -> int:
        """Number of allocated slabs."""
        return len(self._slabs)

    @property
    def held_bytes(self) -> int:
        """Total size of all slabs in bytes."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def used_bytes(self) -> int:
        """Reserved bytes in all slabs."""
        self._collect()
        return self.held_bytes - sum(stop - start for free in self._free for start, stop in free)

    def take(self, nbytes: int) -> Region:
        """Return an uninitialized region; for example, ``pool.take(1000)`` reserves 1024 bytes."""
        self._collect()
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        for slab, free in enumerate(self._free):
            for place, (start, stop) in enumerate(free):
                if stop - start >= size:
                    free[place : place + 1] = [(start + size, stop)] if stop - start > size else []
                    return Region(self._slabs[slab][start : start + nbytes], slab, start, size)
        whole = max(min(self._slab_bytes, max(self.held_bytes, FIRST_BYTES)), size)
        self._slabs.append(host_buffer(whole, self._device))
        self._free.append([(0, whole)])
        return self.take(nbytes)

    def give_back(self, region: Region) -> None:
        """Return a region to the pool; the caller must not use the region afterwards."""
        self._returned.append(region)

    def _collect(self) -> None:
        while self._returned:
            region = self._returned.popleft()
            free, start, stop = self._free[region.slab], region.start, region.start + region.size
            after = next((i for i, span in enumerate(free) if span[0] >= stop), len(free))
            before = after - 1
            if after < len(free) and free[after][0] == stop:
                stop = free.pop(after)[1]
            if before >= 0 and free[before][1] == start:
                start = free.pop(before)[0]
                after = before
            free.insert(after, (start, stop))
