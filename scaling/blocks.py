"""The blocks of a rank for the memory estimate; blocks of the same kind are computed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from allometry.scaling.roles import layer_of
from allometry.scaling.saved import Block, Checkpointing, Kernels
from allometry.scaling.shards import PREFETCHED, RankParts, has_experts


class Kind(NamedTuple):
    """Properties in which the blocks of a model differ."""

    experts: bool
    in_compute: bool  # products in the compute type (``precision.compute_layers``)
    frozen: frozenset[str]  # parameters without gradients, by name in the block
    windowed: bool


@dataclass(frozen=True)
class RankBlocks:
    """The blocks of a rank in model order; ``away``: layers with offloaded activations.

    ``tokens`` of a micro-batch save activations according to ``checkpointing`` until the backward
    of the block; ``dormant`` blocks have no backward and save no activations.
    """

    part: RankParts
    kernels: Kernels
    tokens: int
    checkpointing: Checkpointing
    away: frozenset[int]
    dormant: frozenset[int] = frozenset()

    @cached_property
    def layers(self) -> list[int]:
        """Layers of this rank."""
        return sorted(self.part.layers)

    def block(self, layer: int) -> Block:
        """Return the block of a layer, or of the first layer of the same kind."""
        return self._of_kind[self._kind(layer)]

    def saved(self, layer: int, how: Checkpointing | None = None) -> Counter[str]:
        """Return bytes saved by a micro-batch in a layer, by operation; ``how`` None: as set."""
        return self._kept[self._kind(layer), how or self.checkpointing]

    def staying(self) -> Counter[str]:
        """Return bytes saved on the device by one micro-batch in all layers, by operation."""
        total: Counter[str] = Counter()
        without = self.away | self.dormant
        here = Counter(self._kind(layer) for layer in self.layers if layer not in without)
        for kind, number in here.items():
            kept = self._kept[kind, self.checkpointing]
            total += Counter({name: number * size for name, size in kept.items()})
        return total

    def down(self, layer: int) -> int:
        """Return the number of elements of a block's largest matrix from its hidden width.

        For experts the number is the total of all experts.
        """
        return self._down.get(self._kind(layer).experts, 0)

    @cached_property
    def telling(self) -> frozenset[int]:
        """Indices in ``layers`` that may have the peak of the backward pass.

        Along equal blocks saved activations decrease and gradients increase linearly, so their sum
        has its maximum at an end; ZeRO's prefetched parameters extend the range by a few blocks.
        """
        kinds = [
            (*self._kind(layer), layer in self.away, layer in self.dormant) for layer in self.layers
        ]
        bounds = {i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]} | {0, len(kinds)}
        near = range(-PREFETCHED - 2, PREFETCHED + 2)
        return frozenset(bound + step for bound in bounds for step in near)

    def _kind(self, layer: int) -> Kind:
        high = self.kernels.precision.compute_layers
        experts = has_experts(self.part.model, layer)
        windowed = self.part.model.windowed(layer)
        return Kind(experts, layer in high, self.part.frozen_in(layer), windowed)

    @cached_property
    def _of_kind(self) -> dict[Kind, Block]:
        how = self.part.tp, self.part.ep, self.part.whole_experts
        first = {self._kind(layer): layer for layer in reversed(self.layers)}
        model = self.part.model
        return {
            kind: Block(model, layer, self.kernels, *how, frozen=kind.frozen)
            for kind, layer in first.items()
        }

    @cached_property
    def _kept(self) -> dict[tuple[Kind, Checkpointing], Counter[str]]:
        ways: set[Checkpointing] = {self.checkpointing, "none"}
        return {
            (kind, how): block.saved(self.tokens, how)
            for kind, block in self._of_kind.items()
            for how in ways
        }

    @cached_property
    def _down(self) -> dict[bool, int]:
        largest: dict[bool, int] = {}
        for spec, _ in self.part.counted:
            layer = layer_of(spec.name)
            if layer is not None and spec.name.endswith((".down.weight", ".down")):
                experts = has_experts(self.part.model, layer)
                largest[experts] = max(largest.get(experts, 0), self.part.sizes[spec])
        return largest
