"""Seconds of steps, and their numbers in the host's memory, without waiting for later steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

Mark = Any
"""A point in the order of what the device does, as a ``Clock`` makes it."""
Span = tuple[Mark, Mark]


class Clock(Protocol):
    """Marks points in the work of a device and tells the seconds between them."""

    lag: int
    """Steps that may be under way when the next one is queued."""

    def mark(self) -> Mark:
        """Mark what was asked of the device so far; waits for nothing."""

    def seconds(self, start: Mark, end: Mark) -> float:
        """Wait until the device has come to ``end``; the seconds that it took from ``start``."""


class HostClock(Clock):
    """Of a CPU: what was asked of it is done."""

    lag = 0

    @override
    def mark(self) -> float:
        return time.perf_counter()

    @override
    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock(Clock):
    """Of a GPU: a mark is an event of the current stream, so waiting for it waits for no more."""

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
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else HostClock()


class StepTimer:
    """Tells the seconds of each step, from the end of the one before; pauses do not count.

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
        """End a step and begin the next one; what ``seconds`` takes."""
        now = self._clock.mark()
        spans = [*self._spans, (self._begun, now)]
        self._spans, self._begun = [], now
        return spans

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs meanwhile does not count."""
        self._spans.append((self._begun, self._clock.mark()))
        try:
            yield
        finally:
            self._begun = self._clock.mark()

    def seconds(self, spans: Sequence[Span]) -> float:
        """Wait until a step has run; its seconds."""
        return sum(self._clock.seconds(start, end) for start, end in spans)


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor in the host's memory.

    A GPU's is queued to be copied to pinned memory: what is returned may be read once the device
    has come to a mark that was made afterwards.
    """
    if tensor.device.type != "cuda":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
