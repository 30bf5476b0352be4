"""Peak memory of a step by the allocator: from its counter on CUDA, from its events on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.autograd.profiler import profile


class AllocatorLog:
    """Context that measures the peak of allocated bytes since ``begin``.

    Enter it before the first relevant tensor is created. torch's CPU allocator has no counter; it
    reports each allocated and freed block to the profiler.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._profile: Any = None
        self._begun_ns = 0
        self._peak: int | None = None

    def __enter__(self) -> AllocatorLog:
        """Start the profiler, on a CPU."""
        if not self._on_gpu:
            self._profile = profile(use_cpu=True, profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop the profiler."""
        if self._profile is not None:
            profiler, self._profile = self._profile, None
            profiler.__exit__(*raised)

    def begin(self) -> None:
        """Reset the peak."""
        self._begun_ns = time.time_ns()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the peak in bytes since ``begin``; on a CPU this stops the profiler."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated(self._device)
        profiler, self._profile = self._profile, None
        profiler.__exit__(None, None, None)
        events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        total = best = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            if event.start_ns() >= self._begun_ns:
                best = max(best, total)
        return best
