"""Copies between a device and the host that overlap with computation, and their synchronization.

A lane is a queue of copies in one direction. On CUDA a lane is a stream: the host enqueues a copy
and continues, and the computation waits for the copy's event on the device. On a CPU a copy
completes immediately. Tests use a third kind of lane, whose copies run as late as a GPU's may.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override


class Ticket(Protocol):
    """Handle of a copy that may be in progress."""

    def wait(self) -> None:
        """Make all later computation wait for the copy, without blocking the host."""


class Lane(Protocol):
    """Queue of copies that run in order, each after all computation enqueued before it."""

    def __call__(self, source: Tensor, target: Tensor) -> Ticket | None:
        """Start a copy; None: complete. Both tensors must stay alive until the ticket's wait."""


def lanes_of(device: torch.device) -> tuple[Lane, Lane]:
    """Return a lane to the host and a lane to the device."""
    if device.type != "cuda":
        return copy_at_once, copy_at_once
    return CudaLane(device), CudaLane(device)


def copy_at_once(source: Tensor, target: Tensor) -> None:
    """Copy immediately: the lane of devices without asynchronous copies."""
    target.copy_(source)


class CudaLane(Lane):
    """CUDA stream for copies; host memory must be pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    @override
    def __call__(self, source: Tensor, target: Tensor) -> Ticket:
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return _CudaTicket(self._stream.record_event(), computing)


class _CudaTicket(Ticket):
    def __init__(self, done: torch.cuda.Event, computing: torch.cuda.Stream) -> None:
        self._done, self._computing = done, computing

    @override
    def wait(self) -> None:
        # The stream that allocated the memory, and the stream that reads it: usually the same.
        self._computing.wait_event(self._done)
        current = torch.cuda.current_stream(self._computing.device)
        if current != self._computing:
            current.wait_event(self._done)


class Transfer:
    """A copy and the device memory that it reads or fills.

    The memory must not return to the allocator while a lane uses it, so the computation waits for
    the copy before the memory is released. (``record_stream`` would keep the memory until the copy
    has actually run, long after a host that runs ahead needs it for the next block.)
    """

    def __init__(self, memory: Tensor, ticket: Ticket | None = None) -> None:
        self._memory, self._ticket = memory, ticket

    @property
    def on_its_way(self) -> bool:
        """True if the computation has not waited for the copy yet."""
        return self._ticket is not None

    def wait(self) -> Tensor:
        """Make the computation wait for the copy; return the device memory."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.wait()
        return self._memory

    def __del__(self) -> None:
        # A graph may be released before its backward pass, with copies in progress.
        self.wait()
