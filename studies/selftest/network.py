"""Test of messages between ranks: received values and times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.parallel.mesh import Mesh
from allometry.parallel.simulate import axis_names
from allometry.studies.selftest.messages import SHIFTS, Message

MOST_BYTES = 2**28
"""Larger messages are timed at this size, and their times are scaled."""
MOST_REPEATS, LEAST_REPEATS = 20, 3
_MODULUS = 113  # a prime below the largest integer that is exact in every type


@dataclass(frozen=True)
class Timing:
    """Result of one message on all ranks.

    ``seconds``: median over ranks of each rank's median; ``slowest_seconds``: of ``slowest_rank``.
    ``wrong_ranks``: ranks that received wrong values. ``timed_bytes``: less than the message if it
    was too large.
    """

    message: Message
    seconds: float
    slowest_seconds: float
    slowest_rank: int
    timed_bytes: int
    repeats: int
    wrong_ranks: tuple[int, ...]

    @property
    def bus_bytes_per_s(self) -> float:
        """Bus bandwidth as defined by nccl-tests."""
        return self.message.bus_bytes / self.seconds

    def describe(self) -> dict[str, Any]:
        """Return JSON."""
        return asdict(self.message) | {
            "seconds": self.seconds,
            "slowest_seconds": self.slowest_seconds,
            "slowest_rank": self.slowest_rank,
            "timed_bytes": self.timed_bytes,
            "repeats": self.repeats,
            "bus_bytes_per_s": self.bus_bytes_per_s,
            "wrong_ranks": list(self.wrong_ranks),
        }


def time_messages(mesh: Mesh, messages: Sequence[Message], seconds: float) -> list[Timing]:
    """Send each message, check the received values, and time it; all ranks make the same call.

    ``seconds``: approximate total time. For example,
    ``time_messages(mesh, messages, 45.0)[0].bus_bytes_per_s``.
    """
    groups = _groups(mesh)
    each = seconds / max(1, len(messages))
    return [_time(mesh, message, groups[message.axis], each) for message in messages]


def _groups(mesh: Mesh) -> dict[str, dist.ProcessGroup]:
    """Return the group of each axis by its name in messages."""
    found: dict[str, dist.ProcessGroup] = {}
    by_group = axis_names(mesh)
    for whole in (mesh.expert_mesh, mesh.device_mesh):
        for name in whole.mesh_dim_names or ():
            group = whole.get_group(name)
            found[by_group.get(group.group_name, name)] = group
    for name in ("stage", "edp", "hdp", "ep", "tp", "pp"):
        axis = mesh.axis(name)
        if axis.size > 1:
            found[name] = axis.group
    everyone = dist.group.WORLD
    assert everyone is not None
    return {"ranks": everyone} | found


def _time(mesh: Mesh, message: Message, group: dist.ProcessGroup, seconds: float) -> Timing:
    exchange = Exchange.of(message, group, mesh.device)
    right = exchange.check()
    exchange.received.zero_()  # repeated sums would overflow
    _synchronize(mesh.device)
    mesh.barrier("timing a message")
    begun = time.perf_counter()
    exchange.send()
    _synchronize(mesh.device)
    # All ranks must use the same number of repeats, determined by the slowest one.
    once = _largest(mesh, time.perf_counter() - begun)
    repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(seconds / max(once, 1e-9))))
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        exchange.send()
        _synchronize(mesh.device)
        taken.append(time.perf_counter() - begun)
    scale = message.bytes / exchange.bytes
    told = mesh.gather_objects((statistics.median(taken) * scale, right))
    medians = [median for median, _ in told]
    slowest = max(range(len(medians)), key=medians.__getitem__)
    wrong = tuple(rank for rank, (_, correct) in enumerate(told) if not correct)
    return Timing(
        message,
        statistics.median(medians),
        medians[slowest],
        slowest,
        exchange.bytes,
        repeats,
        wrong,
    )


@dataclass
class Exchange:
    """A message that can be sent repeatedly: only ``send`` is timed.

    ``sent``: this rank's input; ``received``: its output. ``bytes``: of the complete message.
    """

    message: Message
    group: dist.ProcessGroup
    sent: Tensor
    received: Tensor
    bytes: int

    @classmethod
    def of(cls, message: Message, group: dist.ProcessGroup, device: torch.device) -> Exchange:
        """Create the tensors of a message, at most ``MOST_BYTES``, divisible by its ranks."""
        dtype: torch.dtype = getattr(torch, message.dtype)
        ranks = group.size()
        part = max(1, min(message.bytes, MOST_BYTES) // dtype.itemsize // ranks)
        whole = part * ranks
        long_in = message.kind != "all-gather"
        long_out = message.kind != "reduce-scatter"
        sent = torch.zeros(whole if long_in else part, dtype=dtype, device=device)
        received = torch.zeros(whole if long_out else part, dtype=dtype, device=device)
        return cls(message, group, sent, received, whole * dtype.itemsize)

    def send(self) -> None:
        """Send and receive the message once."""
        kind, group = self.message.kind, self.group
        if kind in SHIFTS:
            for work in dist.batch_isend_irecv(list(self._transfers(SHIFTS[kind]))):
                work.wait()
        elif kind == "broadcast":
            dist.broadcast(self.received, dist.get_process_group_ranks(group)[0], group=group)
        else:
            _COLLECTIVES[kind](self.received, self.sent, group)

    def check(self) -> bool:
        """Send known numbers; return True if the expected ones are received."""
        rank, ranks = self.group.rank(), self.group.size()
        part = self.received.numel() // (1 if self.message.kind == "reduce-scatter" else ranks)
        wanted = self._fill(rank, ranks, part)
        self.send()
        return bool((self.received == wanted.to(self.received.dtype)).all())

    def _fill(self, rank: int, ranks: int, part: int) -> Tensor:
        """Fill this rank's input; return the expected output."""
        kind, device = self.message.kind, self.sent.device
        places = torch.arange(self.sent.numel(), device=device)
        if kind == "all-gather":
            self.sent.copy_(_pattern(places, rank))
            every = [_pattern(places, source) for source in range(ranks)]
            return torch.cat(every)
        if kind == "all-to-all":
            here = torch.arange(part, device=device)
            to = [_pattern(here, rank * ranks + target) for target in range(ranks)]
            self.sent.copy_(torch.cat(to))
            return torch.cat([_pattern(here, source * ranks + rank) for source in range(ranks)])
        if kind in SHIFTS:
            self.sent.copy_(_pattern(places, rank))
            return _pattern(places, (rank - SHIFTS[kind]) % ranks)
        if kind == "broadcast":
            self.received.copy_(_pattern(places, rank))
            return _pattern(places, 0)
        # Sums: each number comes from one rank and zeros from the others, exact in any type.
        self.sent.copy_(torch.where(places % ranks == rank, _pattern(places, 0), 0))
        if kind == "all-reduce":
            self.received.copy_(self.sent)
            return _pattern(places, 0)
        return _pattern(places, 0)[rank * part : (rank + 1) * part]

    def _transfers(self, shift: int) -> Iterator[dist.P2POp]:
        ranks = dist.get_process_group_ranks(self.group)
        mine = self.group.rank()
        target, source = (ranks[(mine + by) % len(ranks)] for by in (shift, -shift))
        yield dist.P2POp(dist.isend, self.sent, target, self.group)
        yield dist.P2POp(dist.irecv, self.received, source, self.group)


def _all_reduce(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(received, group=group)


def _all_gather(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_gather_into_tensor(received, sent, group=group)


def _reduce_scatter(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    dist.reduce_scatter_tensor(received, sent, group=group)


def _all_to_all(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
    dist.all_to_all_single(received, sent, group=group)


_COLLECTIVES: dict[str, Callable[[Tensor, Tensor, dist.ProcessGroup], None]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
}


def _pattern(places: Tensor, salt: int) -> Tensor:
    return (places + 31 * salt) % _MODULUS


def _largest(mesh: Mesh, number: float) -> float:
    if mesh.world_size == 1:
        return number
    held = torch.tensor([number], dtype=torch.float64)
    dist.all_reduce(held, dist.ReduceOp.MAX, group=mesh.host_group)
    return float(held)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
