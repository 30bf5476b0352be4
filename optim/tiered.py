"""Optimizer with offloaded states and fp32 parameters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from allometry.configs.execution import Zero, bytes_of
from allometry.optim.matrix_ops import MatrixOps
from allometry.optim.offload.gradients import HostGradients
from allometry.optim.offload.held import (
    MASTER,
    Held,
    Place,
    Stored,
    WorkingCopy,
    joined,
    laid_out,
    without_memory,
)
from allometry.optim.offload.pieces import Piece, packed, pieces_of
from allometry.optim.offload.plan import Tier, assign
from allometry.optim.offload.stream import FileHome, Home, HostHome, Stream
from allometry.optim.offload.swap import Moved, SwapFile
from allometry.optim.optimizer import RuleOptimizer
from allometry.optim.states import Group, Item, items_of
from allometry.parallel.folder import described
from allometry.parallel.mesh import local
from allometry.scaling.update_rules import UpdateRule

LEAST_BYTES = 4096
"""State tensors with fewer bytes on a rank (counts, radii, moments of norms) stay on the device."""


@dataclass
class _Bucket:
    pieces: list[Piece]
    tier: Tier
    held: list[Held] = field(default_factory=list)
    home: Home | None = None  # None: before the first step, or all tensors are small


class TieredOptimizer(RuleOptimizer):
    """Optimizer that moves offloaded states to the parameters' device in buckets for each step.

    Rules operate on the same tensors as without offloading, so parameters and states are
    bit-identical to the optimizer in memory. ``sizes``: approximate bytes of each parameter's
    states on a rank, equal on all ranks of a stage, since all ranks must build the same buckets.
    ``working``: parameters whose fp32 values are offloaded with the states, with their compute
    copies; ``sizes`` includes these values. ``leaving``: parameters whose gradients are stored on
    the host if their states are offloaded, see ``HostGradients``. ``still``: states are not moved,
    but the collectives of the buckets are called (a dry run). Elementwise-updated parameters larger
    than a bucket are moved some rows at a time.

    Raises:
        UserError: ``zero.optimizer_states.nvme`` cannot be used or is too small; see also
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
        working: Mapping[Tensor, WorkingCopy] | None = None,
        leaving: Iterable[Tensor] = (),
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
        if zero.offload == "cpu":  # parameters are on the host, so this tier is too
            tiers = [Tier.DEVICE if tier is Tier.CPU else tier for tier in tiers]
        self._tiers = dict(zip((item.name for item in items), tiers, strict=True))
        self._device = local(items[0].parameter).device
        self._timeout_s, self._still = timeout_s, still
        most = int(wanted.bucket_mib * 2**20)
        self._buckets = {
            rule.name: [
                _Bucket(bucket, tier)
                for tier in (Tier.CPU, Tier.NVME)
                for bucket in packed(self._pieces(rule, of_rule, tier, sizes, most), sizes, most)
            ]
            for rule, of_rule in super()._by_rule()
        }
        away = {item.parameter for item in items if self._tiers[item.name] is not Tier.DEVICE}
        self._working = {p: copy for p, copy in (working or {}).items() if p in away}
        least = (p for p in leaving if p in away and local(p.detach()).nbytes >= LEAST_BYTES)
        self.gradients = HostGradients(least, self._device)
        self._stream: Stream | None = None
        self._swap: SwapFile | None = None
        if wanted.nvme is not None and not still:
            far = (i for i in items if self._tiers[i.name] is Tier.NVME)
            self._swap = SwapFile(wanted.nvme, sum(sizes[item.name] for item in far))

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self.gradients.clear()

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return this rank's part of a gradient; offloaded gradients are copied to the device."""
        if parameter in self.gradients:
            return self.gradients.fetch(parameter)
        return None if parameter.grad is None else local(parameter.grad)

    def stored(self) -> Iterator[tuple[Tensor, str, Stored]]:
        """Yield (parameter, name, state) of all offloaded states, after pending transfers.

        The fp32 values of offloaded parameters have the name ``MASTER``.
        """
        if self._stream is not None:
            self._stream.drain()
        found: dict[tuple[int, str], list[Place]] = {}
        for bucket, home in self._at_home():
            for index, held in enumerate(bucket.held):
                place = Place(held, home, index)
                found.setdefault((id(held.piece.item.parameter), held.key), []).append(place)
        for (_, key), places in found.items():
            parameter = places[0].held.piece.item.parameter
            copy = self._working[parameter] if key == MASTER else None
            yield parameter, key, joined(places, copy)

    def values(self, parameter: Tensor) -> Tensor:
        """Return this rank's part of a parameter; offloaded values are copied to the device."""
        places = [
            Place(held, home, at)
            for bucket, home in self._at_home()
            for at, held in enumerate(bucket.held)
            if held.key == MASTER and held.piece.item.parameter is parameter
        ]
        if not places:
            return local(parameter.detach())
        if self._stream is not None:
            self._stream.settle()
        return joined(places, None).read().to(self._device)

    def rounded_values(self, parameter: Tensor) -> Tensor:
        """Return this rank's part rounded to the compute type, in the parameter's type."""
        copy = self._working.get(parameter)
        part = local(parameter.detach())
        return copy.part.to(part.dtype) if copy is not None and copy.held else part

    def held_bytes(self) -> dict[Tier, int]:
        """Return this rank's bytes of existing states by tier."""
        held = dict.fromkeys(Tier, 0)
        for states in self.state.values():
            held[Tier.DEVICE] += sum(local(each).nbytes for each in states.values())
        for bucket, _ in self._at_home():
            held[bucket.tier] += sum(each.nbytes for each in bucket.held)
        return held

    @property
    def parameters_bytes(self) -> int:
        """Bytes of offloaded fp32 parameters included in ``held_bytes``."""
        of_buckets = (bucket.held for bucket, _ in self._at_home())
        all_held = itertools.chain.from_iterable(of_buckets)
        return sum(held.nbytes for held in all_held if held.key == MASTER)

    @property
    def waited_s(self) -> float:
        """Total seconds that updates have waited for states."""
        return 0.0 if self._stream is None else self._stream.waited_s

    @property
    def moved(self) -> Moved:
        """Amount of data that this rank's file has read and written."""
        return Moved() if self._swap is None else self._swap.moved

    @property
    def folder(self) -> str | None:
        """Folder of this rank's file; None without a file."""
        return None if self._swap is None else str(self._swap.folder)

    def place(self) -> dict[str, str]:
        """Return a record of the file: ``folder``, ``mount``, ``file_system``, ``note``."""
        return {} if self._swap is None else described(self._swap.folder)

    @override
    def _by_rule(self) -> Iterator[tuple[UpdateRule, list[Item]]]:
        for rule, items in super()._by_rule():
            near = [item for item in items if self._tiers[item.name] is Tier.DEVICE]
            if near:
                yield rule, near
            for bucket in self._buckets[rule.name]:
                flat = self._fetch(bucket)
                yield rule, [self._seen(bucket, piece, flat) for piece in bucket.pieces]
                self._send(bucket, flat)
        homes = [home for _, home in self._at_home()]
        if self._stream is None and homes:
            files = any(isinstance(home, FileHome) for home in homes)
            self._stream = Stream(homes, self._device, self._timeout_s, files=files)

    def _pieces(
        self,
        rule: UpdateRule,
        of_rule: Sequence[Item],
        tier: Tier,
        sizes: Mapping[str, int],
        most: int,
    ) -> list[Piece]:
        items = [item for item in of_rule if self._tiers[item.name] is tier]
        # The fake tensors of a dry run cannot be split, and elementwise rules use no collectives.
        return (
            [Piece(item) for item in items] if self._still else pieces_of(rule, items, sizes, most)
        )

    def _fetch(self, bucket: _Bucket) -> Tensor | None:
        """Fetch the states of a bucket into ``state`` for the rules; return their bytes."""
        if bucket.home is None:
            return None
        assert self._stream is not None
        flat = self._stream.take()
        for held, part in self._parts(bucket, flat):
            if held.key != MASTER:
                self.state[held.piece.tensor][held.key] = held.wrapped(part)
            elif held.piece.rows is None:
                self._working[held.piece.item.parameter].show(part)
        return flat

    def _seen(self, bucket: _Bucket, piece: Piece, flat: Tensor | None) -> Item:
        """Return the item that the rule updates, with the states shared by all its pieces."""
        parameter, values = piece.item.parameter, None
        if piece.rows is None:
            if parameter in self.gradients:
                parameter.grad = laid_out(self.gradients.fetch(parameter), parameter)
            return piece.item
        if flat is not None:
            for held, part in self._parts(bucket, flat):
                if held.key == MASTER and held.piece is piece:
                    values = part
            for key, value in self.state[parameter].items():
                self.state[piece.tensor][key] = value if piece.last else value.clone()
        if parameter in self.gradients:
            return piece.seen(self.gradients.fetch(parameter, piece), values)
        whole = parameter.grad
        return piece.seen(None if whole is None else piece.of(local(whole)), values)

    def _send(self, bucket: _Bucket, flat: Tensor | None) -> None:
        """Remove a bucket's states from ``state``; in the first step, allocate their home."""
        if bucket.home is None or flat is None:
            self._settle(bucket)
        else:
            assert self._stream is not None
            for held, there in self._parts(bucket, flat):
                if held.key == MASTER:
                    copy = self._working[held.piece.item.parameter]
                    held.piece.of(copy.part).copy_(there)
                    if held.piece.rows is None:
                        copy.leave()
                    continue
                now = local(self.state[held.piece.tensor].pop(held.key))
                if now.data_ptr() != there.data_ptr():  # the rule has created a new tensor
                    there.copy_(now)
            self._stream.give_back()
        for piece in bucket.pieces:
            if piece.rows is not None:
                rest = self.state.pop(piece.tensor)
                if piece.last:
                    self.state[piece.item.parameter].update(rest)
                piece.unseen()
            elif piece.item.parameter in self.gradients:
                piece.item.parameter.grad = None

    def _settle(self, bucket: _Bucket) -> None:
        if self._still:
            return
        found: list[tuple[Held, Tensor]] = []
        for piece in bucket.pieces:
            copy = self._working.get(piece.item.parameter)
            values = local(piece.tensor.detach())
            if copy is not None and piece.item.part.nbytes >= LEAST_BYTES:
                if piece.rows is None or piece.rows.start == 0:
                    copy.hold()
                found.append((Held(piece, MASTER, without_memory(piece.tensor)), values))
            for key, value in self.state[piece.tensor].items():
                part = local(value)
                if part.nbytes >= LEAST_BYTES or (piece.rows is not None and part.dim()):
                    found.append((Held(piece, key, without_memory(value)), part))
        if not found:
            return
        home = self._home(bucket.tier, [part.nbytes for _, part in found])
        for index, (held, part) in enumerate(found):
            home.put(index, part.contiguous().flatten().view(torch.uint8))
            if held.key != MASTER:
                del self.state[held.piece.tensor][held.key]
                continue
            copy = self._working[held.piece.item.parameter]
            held.piece.of(copy.part).copy_(part)
            if held.piece.last:
                copy.leave()
        bucket.held, bucket.home = [held for held, _ in found], home

    @staticmethod
    def _parts(bucket: _Bucket, flat: Tensor) -> Iterator[tuple[Held, Tensor]]:
        assert bucket.home is not None
        for held, start in zip(bucket.held, bucket.home.starts, strict=True):
            yield held, held.view(flat[start : start + held.nbytes])

    def _home(self, tier: Tier, sizes: list[int]) -> Home:
        if tier is Tier.CPU:
            return HostHome(sizes, self._device)
        assert self._swap is not None
        return FileHome(sizes, self._swap)

    def _at_home(self) -> Iterator[tuple[_Bucket, Home]]:
        for bucket in itertools.chain.from_iterable(self._buckets.values()):
            if bucket.home is not None:
                yield bucket, bucket.home


def values_of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter between steps, from its current location."""
    if isinstance(optimizer, TieredOptimizer):
        return optimizer.values(parameter)
    return local(parameter.detach())


def rounded_values_of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return this rank's part; offloaded values in the compute precision, without a transfer."""
    if isinstance(optimizer, TieredOptimizer):
        return optimizer.rounded_values(parameter)
    return local(parameter.detach())


def gradient_of(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Return this rank's part of a parameter's gradient (clipped if clipping ran)."""
    if isinstance(optimizer, TieredOptimizer):
        return optimizer.gradient(parameter)
    return None if parameter.grad is None else local(parameter.grad)
