"""A device whose copies run as late as those of a GPU may, with a clock and a log."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Machine:
    """One device and two engines that copy, ``out`` and ``back``.

    What computes is the process itself, and takes time where ``computes`` says so. A copy moves
    its bytes when somebody waits for it or for a later one of its lane, no sooner, so whoever reads
    without waiting reads what was there before. Like a GPU it knows addresses only: memory that was
    let go meanwhile is an error. Copies of a lane take ``seconds_per_byte``, one after the other.
    """

    def __init__(self, seconds_per_byte: float = 0.0) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.out, self.back = (LateLane(self, name, seconds_per_byte) for name in ("out", "back"))

    def computes(self, what: str, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.log.append(what)

    @property
    def lanes(self) -> tuple[LateLane, LateLane]:
        """What ``ActivationStore`` takes."""
        return self.out, self.back


class LateLane:
    """A queue of copies."""

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
        """Run what was queued up to this one."""
        while ticket in self._queued:
            each = self._queued.popleft()
            each.target.tensor().copy_(each.source.tensor())
            self.run += 1


@dataclass(frozen=True)
class Address:
    """Where bytes lie, without keeping them."""

    storage: StorageWeakRef
    start: int
    size: int

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        storage = StorageWeakRef(tensor.untyped_storage())
        return cls(storage, tensor.storage_offset(), tensor.numel())

    def tensor(self) -> Tensor:
        """The bytes, if they are still there."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, "memory was let go while a copy used it"
        empty = torch.empty(0, dtype=torch.uint8)
        return empty.set_(storage, self.start, (self.size,), (1,))


@dataclass(eq=False)
class LateTicket:
    """A copy on its way."""

    lane: LateLane
    source: Address
    target: Address
    done_at: float
    waits: int = field(default=0)

    def wait(self) -> None:
        """The device waits: its clock goes on to the end of the copy."""
        self.waits += 1
        machine = self.lane.machine
        machine.now = max(machine.now, self.done_at)
        machine.log.append(f"wait {self.lane.name}")
        self.lane.run_until(self)
