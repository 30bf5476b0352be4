"""Time steps and copy their numbers to host memory, without waiting for later steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

Mark = Any
"""A point in the order of the device's work, created by a ``Clock``."""
Span = tuple[Mark, Mark]


class Clock(Protocol):
    """Marks points in a device's work and measures the seconds between them."""

    lag: int
    """Number of steps that may be running when the next step is queued."""

    def mark(self) -> Mark:
        """Mark the work queued on the device so far, without waiting."""

    def seconds(self, start: Mark, end: Mark) -> float:
        """Wait until the device has reached ``end``; return the seconds since ``start``."""


class HostClock(Clock):
    """Clock of a CPU, where queued work is already done."""

    lag = 0

    @override
    def mark(self) -> float:
        return time.perf_counter()

    @override
    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock(Clock):
    """Clock of a GPU: a mark is an event on the current stream, which can be waited for alone."""

    lag = 1

    @override
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @override
    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


class StepTimer:
    """Measures the seconds of each step from the end of the previous one, without pauses.

    timer.start()
    ...                      # a step
    spans = timer.lap()
    with timer.paused():
        ...                  # evaluation
    timer.seconds(spans)     # waits for that step alone
    """

    def __init__(self, clock: Clock) -> None:
        self.lag = clock.lag
        self._clock = clock
        self._spans: list[Span] = []
        self._begun: Mark = None

    def start(self) -> None:
        """Begin the first step."""
        self._spans, self._begun = [], self._clock.mark()

    def lap(self) -> list[Span]:
        """End a step and begin the next; return the argument for ``seconds``."""
        now = self._clock.mark()
        spans = [*self._spans, (self._begun, now)]
        self._spans, self._begun = [], now
        return spans

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in the context."""
        self._spans.append((self._begun, self._clock.mark()))
        try:
            yield
        finally:
            self._begun = self._clock.mark()

    def seconds(self, spans: Sequence[Span]) -> float:
        """Wait until a step has run, and return its seconds."""
        return sum(self._clock.seconds(start, end) for start, end in spans)


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor in host memory.

    A GPU tensor is copied asynchronously to pinned memory: the result may be read once the device
    has reached a mark made after this call.
    """
    if tensor.device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
