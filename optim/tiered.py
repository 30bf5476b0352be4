"""An optimizer whose states live in the host's memory and in files between steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from allometry.configs.execution import Zero, bytes_of
from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.offload.plan import Tier, assign, packed
from allometry.optim.offload.stream import FileHome, Home, HostHome, Stream
from allometry.optim.offload.swap import SwapFile
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.states import Group, Item, items_of
from allometry.parallel.deepspeed.boxes import Stretch
from allometry.parallel.mesh import local
from allometry.scaling.update_rules import UpdateRule

LEAST_BYTES = 4096
"""State tensors of fewer bytes on a rank (counts, radii, moments of norms) stay on the device."""


class Stored(NamedTuple):
    """A state between steps: ``like`` has its shape, type and layout, and no memory of its own.

    ``read`` returns this rank's part on the host, and ``write`` replaces it; of a ``Stretch`` in
    one dimension.
    """

    like: Tensor | Stretch
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


class _Held(NamedTuple):
    """A state tensor that lives in a home: the layout of what the rule made."""

    parameter: Tensor
    key: str
    like: Tensor

    def view(self, data: Tensor) -> Tensor:
        """Return bytes, uint8 in one dimension, as this rank's part of the tensor."""
        part = local(self.like)
        return data.view(part.dtype).view(part.shape)

    def wrapped(self, part: Tensor) -> Tensor:
        """Return this rank's part as the rule's tensor: a DTensor again if it was one."""
        return _laid_out(part, self.like)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's part."""
        return local(self.like).nbytes


@dataclass
class _Bucket:
    items: list[Item]
    tier: Tier
    held: list[_Held] = field(default_factory=list)
    home: Home | None = None  # None: before the first step, or nothing in it is large enough


class TieredOptimizer(RuleOptimizer):
    """Updates parameters where they are, with states that come there in buckets and leave again.

    The rules see the tensors that they would see otherwise, so every parameter and state has the
    bits of the optimizer in memory. ``sizes``: about the bytes of each parameter's states on a
    rank, equal on all ranks of a stage, as all must make the same buckets. ``still``: states stay
    where the rules make them, though the calls are those of the buckets (a rehearsal).

    Raises:
        UserError: ``zero.optimizer_states.nvme`` cannot be used or lacks the room; see also
            ``RuleOptimizer``.
        StatesLost: states cannot be written or read back.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        ops: MatrixOps,
        zero: Zero,
        sizes: Mapping[str, int],
        timeout_s: float = 600.0,
        *,
        still: bool = False,
    ) -> None:
        super().__init__(groups, ops)
        assert zero.optimizer_states is not None
        wanted, items = zero.optimizer_states, items_of(self.param_groups)
        total = sum(sizes[item.name] for item in items)
        limits = {} if zero.offload == "cpu" else {Tier.DEVICE: bytes_of(wanted.device, total)}
        if wanted.nvme is None:
            limits[Tier.CPU] = total
        else:
            limits |= {Tier.CPU: bytes_of(wanted.cpu or 0.0, total), Tier.NVME: total}
        tiers = assign([sizes[item.name] for item in items], limits)
        if zero.offload == "cpu":  # beside parameters of the host is in the host's memory
            tiers = [Tier.DEVICE if tier is Tier.CPU else tier for tier in tiers]
        self._tiers = dict(zip((item.name for item in items), tiers, strict=True))
        self._device = local(items[0].parameter).device
        self._timeout_s, self._still = timeout_s, still
        self._buckets = {
            rule.name: [
                _Bucket(bucket, tier)
                for tier in (Tier.CPU, Tier.NVME)
                for bucket in packed(
                    [item for item in of_rule if self._tiers[item.name] is tier],
                    sizes,
                    int(wanted.bucket_mib * 2**20),
                )
            ]
            for rule, of_rule in super()._by_rule()
        }
        self._stream: Stream | None = None
        self._swap: SwapFile | None = None
        if wanted.nvme is not None and not still:
            away = (i for i in items if self._tiers[i.name] is Tier.NVME)
            self._swap = SwapFile(wanted.nvme, sum(sizes[item.name] for item in away))

    def stored(self) -> Iterator[tuple[Tensor, str, Stored]]:
        """Yield (parameter, name, state) of all that is not in ``state``, once it is at rest."""
        if self._stream is not None:
            self._stream.drain()
        for bucket, home in self._at_home():
            for index, held in enumerate(bucket.held):
                yield held.parameter, held.key, _stored(held, home, index)

    def held_bytes(self) -> dict[Tier, int]:
        """Return this rank's bytes of states in each tier, once they are made."""
        held = dict.fromkeys(Tier, 0)
        for states in self.state.values():
            held[Tier.DEVICE] += sum(local(each).nbytes for each in states.values())
        for bucket, _ in self._at_home():
            held[bucket.tier] += sum(each.nbytes for each in bucket.held)
        return held

    @override
    def _by_rule(self) -> Iterator[tuple[UpdateRule, list[Item]]]:
        for rule, items in super()._by_rule():
            near = [item for item in items if self._tiers[item.name] is Tier.DEVICE]
            if near:
                yield rule, near
            for bucket in self._buckets[rule.name]:
                flat = self._fetch(bucket)
                yield rule, bucket.items
                self._send(bucket, flat)
        homes = [home for _, home in self._at_home()]
        if self._stream is None and homes:
            files = any(isinstance(home, FileHome) for home in homes)
            self._stream = Stream(homes, self._device, self._timeout_s, files=files)

    def _fetch(self, bucket: _Bucket) -> Tensor | None:
        """Put a bucket's states into ``state`` where rules look for them; return their bytes."""
        if bucket.home is None:
            return None
        assert self._stream is not None
        flat = self._stream.take()
        for held, start in zip(bucket.held, bucket.home.starts, strict=True):
            part = held.view(flat[start : start + held.nbytes])
            self.state[held.parameter][held.key] = held.wrapped(part)
        return flat

    def _send(self, bucket: _Bucket, flat: Tensor | None) -> None:
        """Take a bucket's states out of ``state`` again; the first time, give them a home."""
        if bucket.home is None or flat is None:
            self._settle(bucket)
            return
        assert self._stream is not None
        for held, start in zip(bucket.held, bucket.home.starts, strict=True):
            there = held.view(flat[start : start + held.nbytes])
            now = local(self.state[held.parameter].pop(held.key))
            if now.data_ptr() != there.data_ptr():  # a rule that has made a new tensor
                there.copy_(now)
        self._stream.give_back()

    def _settle(self, bucket: _Bucket) -> None:
        found = [
            (_Held(item.parameter, key, _without_memory(value)), local(value))
            for item in bucket.items
            for key, value in self.state[item.parameter].items()
            if local(value).nbytes >= LEAST_BYTES
        ]
        if self._still or not found:
            return
        home = self._home(bucket.tier, [part.nbytes for _, part in found])
        for index, (held, part) in enumerate(found):
            home.put(index, part.contiguous().flatten().view(torch.uint8))
            del self.state[held.parameter][held.key]
        bucket.held, bucket.home = [held for held, _ in found], home

    def _home(self, tier: Tier, sizes: list[int]) -> Home:
        if tier is Tier.CPU:
            return HostHome(sizes, self._device)
        assert self._swap is not None
        return FileHome(sizes, self._swap)

    def _at_home(self) -> Iterator[tuple[_Bucket, Home]]:
        for bucket in itertools.chain.from_iterable(self._buckets.values()):
            if bucket.home is not None:
                yield bucket, bucket.home


def _stored(held: _Held, home: Home, index: int) -> Stored:
    def write(part: Tensor) -> None:
        home.put(index, part.contiguous().flatten().view(torch.uint8))

    return Stored(held.like, lambda: held.view(home.get(index)), write)


def _without_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of this shape, type and layout whose part here is one number on the host."""
    part = local(tensor)
    return _laid_out(torch.zeros((), dtype=part.dtype).expand(part.shape), tensor)


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part as a tensor laid out as ``like``, without a copy."""
    if not isinstance(like, DTensor):
        return part
    made: Tensor = DTensor(part, like._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    return made
