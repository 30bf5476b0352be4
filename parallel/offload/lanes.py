"""Copies between a device and the host beside the computation, and who waits for them.

A lane is a queue of copies in one direction. On CUDA it is a stream: the host asks for a copy and
goes on, and what computes waits for its event on the device. On a CPU a copy is done when it was
asked for. Tests have a third kind, whose copies happen as late as a GPU's might.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override


class Ticket(Protocol):
    """A copy that may still be on its way."""

    def wait(self) -> None:
        """Let all computation asked for from now on wait for the copy; the host does not."""


class Lane(Protocol):
    """Copies that run in their order, each after all computation asked for before it."""

    def __call__(self, source: Tensor, target: Tensor) -> Ticket | None:
        """Begin to copy; None: it is done. Both must stay until somebody has waited for it."""


def lanes_of(device: torch.device) -> tuple[Lane, Lane]:
    """Return a lane to the host and one back."""
    if device.type != "cuda":
        return copy_at_once, copy_at_once
    return CudaLane(device), CudaLane(device)


def copy_at_once(source: Tensor, target: Tensor) -> None:
    """Copy now: a lane where there is nothing to overlap with."""
    target.copy_(source)


class CudaLane(Lane):
    """A CUDA stream of its own; memory of the host must be pinned."""

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
        # The stream whose memory it is, and the one that reads it: usually the same.
        self._computing.wait_event(self._done)
        current = torch.cuda.current_stream(self._computing.device)
        if current != self._computing:
            current.wait_event(self._done)


class Transfer:
    """A copy, and the device's memory that it reads or fills.

    That memory must not return to the allocator while a lane uses it: what computes waits for the
    copy before it is let go. (``record_stream`` would keep it until the copy has really run, long
    after a host that runs ahead wants it for the next block.)
    """

    def __init__(self, memory: Tensor, ticket: Ticket | None = None) -> None:
        self._memory, self._ticket = memory, ticket

    @property
    def on_its_way(self) -> bool:
        """Whether nothing has waited for the copy yet."""
        return self._ticket is not None

    def wait(self) -> Tensor:
        """Let what computes wait for the copy; return the device's memory."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            ticket.wait()
        return self._memory

    def __del__(self) -> None:
        # A graph may be dropped before its backward, with copies on their way.
        self.wait()
