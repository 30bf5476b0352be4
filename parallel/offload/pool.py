"""Memory of the host for activations: asked for while the first step runs, and used again."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from allometry.parallel.buffers import host_buffer

SLAB_BYTES = 256 * 2**20
_ALIGNMENT = 512


class Region(NamedTuple):
    """Bytes of a slab: ``memory`` is uint8, ``size`` what is taken, filled up to the alignment."""

    memory: Tensor
    slab: int
    start: int
    size: int


class HostPool:
    """Hands out regions of large slabs, locked for a GPU's ``device``, and takes them back.

    The first slab with room gives it at its lowest address, and neighbours that are free become
    one: equal steps find their memory where the first one had it, and nothing is allocated after
    it. What is larger than a slab has one to itself. Slabs stay as long as the pool.
    """

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        self._device, self._slab_bytes = device, slab_bytes
        self._slabs: list[Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # of each slab: (start, stop), ascending
        # Graphs are freed by any thread at any time, in the midst of ``take`` too.
        self._returned: deque[Region] = deque()

    @property
    def allocations(self) -> int:
        """How often memory was asked for."""
        return len(self._slabs)

    @property
    def held_bytes(self) -> int:
        """Bytes of all slabs."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def used_bytes(self) -> int:
        """Bytes that are handed out."""
        self._collect()
        return self.held_bytes - sum(stop - start for free in self._free for start, stop in free)

    def take(self, nbytes: int) -> Region:
        """Return room for ``nbytes``; what is in it is anything."""
        self._collect()
        size = -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        for slab, free in enumerate(self._free):
            for place, (start, stop) in enumerate(free):
                if stop - start >= size:
                    free[place : place + 1] = [(start + size, stop)] if stop - start > size else []
                    return Region(self._slabs[slab][start : start + nbytes], slab, start, size)
        whole = max(self._slab_bytes, size)
        self._slabs.append(host_buffer(whole, self._device))
        self._free.append([(0, whole)])
        return self.take(nbytes)

    def give_back(self, region: Region) -> None:
        """Take a region back; whoever had it must not touch it any more."""
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
