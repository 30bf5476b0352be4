"""Simulated device whose copies run as late as a GPU permits, with a clock and a log."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Machine:
    """Device with two copy engines, ``out`` and ``back``.

    The process itself computes; computation takes simulated time through ``computes``. A copy moves
    its bytes only when someone waits for it or for a later copy of its lane, so a read without a
    wait sees the old contents. Like a GPU, the device only knows addresses: using memory that was
    freed in the meantime is an error. Copies of a lane take ``seconds_per_byte``, one after
    another.
    """

    def __init__(self, seconds_per_byte: float = 0.0) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.out, self.back = (LateLane(self, name, seconds_per_byte) for name in ("out", "back"))

    def computes(self, what: str, seconds: float) -> None:
        """Advance the clock by ``seconds``."""
        self.now += seconds
        self.log.append(what)

    @property
    def lanes(self) -> tuple[LateLane, LateLane]:
        """Return the two lanes for ``ActivationStore``."""
        return self.out, self.back


class LateLane:
    """Queue of copies."""

    def __init__(self, machine: Machine, name: str, seconds_per_byte: float) -> None:
        self.machine, self.name, self._each = machine, name, seconds_per_byte
        self._free_at = 0.0
        self._queued: deque[LateTicket] = deque()
        self.begun = self.run = 0

    def __call__(self, source: Tensor, target: Tensor) -> LateTicket:
        assert source.numel() == target.numel(), (source.numel(), target.numel())
        start = max(self._free_at, self.machine.now)
        self._free_at = start + source.numel() * self._each
        ticket = LateTicket(self, Address.of(source), Address.of(target), self._free_at)
        self._queued.append(ticket)
        self.begun += 1
        self.machine.log.append(self.name)
        return ticket

    def run_until(self, ticket: LateTicket) -> None:
        """Run the queued copies up to and including ``ticket``."""
        while ticket in self._queued:
            each = self._queued.popleft()
            each.target.tensor().copy_(each.source.tensor())
            self.run += 1


@dataclass(frozen=True)
class Address:
    """Location of bytes, without a reference that keeps them alive."""

    storage: StorageWeakRef
    start: int
    size: int

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.storage_offset(), tensor.numel())

    def tensor(self) -> Tensor:
        """Return the bytes; AssertionError if they were freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "memory was let go while a copy used it"
        empty = torch.empty(0, dtype=torch.uint8)
        return empty.set_(storage, self.start, (self.size,), (1,))


@dataclass(eq=False)
class LateTicket:
    """Pending copy."""

    lane: LateLane
    source: Address
    target: Address
    done_at: float
    waits: int = field(default=0)

    def wait(self) -> None:
        """Make the device wait: its clock advances to the end of the copy."""
        self.waits += 1
        machine = self.lane.machine
        machine.now = max(machine.now, self.done_at)
        machine.log.append(f"wait {self.lane.name}")
        self.lane.run_until(self)
