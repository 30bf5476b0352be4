"""Parameter shards of a rank: shapes after tensor, expert and ZeRO sharding.

``parallel/tensor.py`` and ``parallel/zero.py`` do the sharding; a test compares both on every
preset. Shapes refer to the first rank of each axis, which has the largest of uneven shards.
"""

# E experts, F hidden width, D width

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any

from allometry.configs.model import ModelConfig, MoEModel
from allometry.scaling.inventory import depth_specs, inventory
from allometry.scaling.layout import Layout
from allometry.scaling.roles import EXPERTS, ParamSpec, Role, layer_of

PREFETCHED = 2
"""Number of blocks whose parameters ZeRO prefetches."""


def tensor_dim(spec: ParamSpec) -> int | None:
    """Return the dimension that tensor parallelism shards; None for replicated parameters.

    For example, 0 for ``wq.weight`` and 1 for ``wo.weight``.
    """
    if spec.role in EXPERTS:
        return 1 if spec.role is Role.EXPERT_UP else 2
    if spec.role is Role.VECTOR:
        return 0 if spec.of_heads else None
    if spec.role is Role.ROUTER or ".latent_" in spec.name or spec.name.startswith("aggregator."):
        return None
    return 1 if spec.name.endswith((".wo.weight", ".down.weight")) else 0


def zero_dim(shape: tuple[int, ...], ranks: int) -> int:
    """Return the dimension that ZeRO shards over ``ranks``, for a part of this shape.

    The dimension is 0, except for experts [E, F, D] whose number is not divisible by the number of
    ranks: the ranks beyond E would be empty while others have complete experts. Then it is the
    first divisible dimension, since FSDP2 pads only dimension 0, or 0 if there is none. For
    example, ``zero_dim((4, 6, 8), 8)`` is 2.
    """
    even = [dim for dim, size in enumerate(shape) if size % ranks == 0]
    return even[0] if len(shape) == 3 and even else 0


def part_before_zero(
    spec: ParamSpec, tp: int, ep: int, whole_experts: bool = False
) -> tuple[int, ...]:
    """Return the shape of a rank's part after expert and tensor parallelism, before ZeRO."""
    shape = list(spec.shape)
    whole = whole_experts and spec.role in EXPERTS
    if spec.role in EXPERTS:
        shape[0] //= ep * tp if whole else ep
    dim = tensor_dim(spec)
    if dim is not None and not whole:
        shape[dim] = -(-shape[dim] // tp)
    return tuple(shape)


def shard(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return the shape of the first rank's ZeRO shard of a part.

    For example, (6, 4) over 4 ranks gives (2, 4).
    """
    dim = zero_dim(shape, ranks)
    return (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Return True if ``layer`` of a model has experts."""
    return isinstance(model, MoEModel) and model.has_experts(layer)


@dataclass(frozen=True)
class RankParts:
    """Parameters of one rank: its layers, possibly the ends, sharded over tp, ep and ZeRO.

    ``shards``: number of ZeRO ranks of one replica, 1 at stage 0. ``frozen``: names of the model's
    parameters without gradients (``overrides.frozen_names``).
    """

    model: ModelConfig
    layers: frozenset[int]
    first: bool
    last: bool
    tp: int = 1
    ep: int = 1
    shards: int = 1
    whole_experts: bool = False
    frozen: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        layout: Layout | None,
        pp_rank: int,
        shards: int,
        frozen: frozenset[str] = frozenset(),
    ) -> RankParts:
        """Return the parts of a pipeline rank; ``layout`` None: the full, unsharded model."""
        if layout is None:
            layers = frozenset(range(model.num_blocks))
            return cls(model, layers, True, True, shards=shards, frozen=frozen)
        stages = layout.stages_of(pp_rank)
        last = len(layout.stages) - 1 in stages
        ahead = range(model.num_layers, model.num_blocks) if last else ()
        here = (layer for stage in stages for layer in layout.stages[stage])
        return _known_parts(
            model,
            frozenset((*here, *ahead)),
            0 in stages,
            last,
            layout.degrees.tp,
            layout.degrees.ep,
            shards,
            layout.degrees.whole_experts,
            frozen,
        )

    def specs(self) -> tuple[ParamSpec, ...]:
        """Return the specs of this rank's parameters, including the copy of a tied embedding."""
        return self._specs_of(self.layers)

    def _specs_of(self, layers: Iterable[int]) -> tuple[ParamSpec, ...]:
        # A tied head on another stage than its embedding is a copy of it.
        first = self.first or (self.last and self.model.tied_embeddings)
        count, given = self.model.num_layers, frozenset(layers)
        main = sorted(layer for layer in given if layer < count)
        listed = inventory(self.model, main, first=first, last=self.last)
        if self.last and self.model.num_depths and not self.first and first:
            listed += tuple(islice(depth_specs(self.model, mirrored=True), 1))
        # Of depths that are alike one is asked for.
        return tuple(
            spec
            for spec in listed
            if (layer := layer_of(spec.name)) is None or layer < count or layer in given
        )

    @cached_property
    def counted(self) -> tuple[tuple[ParamSpec, int], ...]:
        """Distinct parameters with their multiplicity over layers of the same kind."""
        alike: dict[Any, list[int]] = {}
        for layer in sorted(self.layers):
            kind = has_experts(self.model, layer), self.frozen_in(layer)
            alike.setdefault(kind, []).append(layer)
        number = {layers[0]: len(layers) for layers in alike.values()}
        return tuple((s, number.get(layer_of(s.name), 1)) for s in self._specs_of(number))  # type: ignore[arg-type]

    @cached_property
    def sizes(self) -> dict[ParamSpec, int]:
        """Elements of this rank's part of each parameter, before ZeRO."""
        return {spec: math.prod(self.part(spec)) for spec in self.specs()}

    @cached_property
    def trained(self) -> dict[ParamSpec, int]:
        """Elements of this rank's part of each trained parameter, before ZeRO."""
        if not self.frozen:
            return self.sizes
        return {spec: size for spec, size in self.sizes.items() if spec.name not in self.frozen}

    def frozen_in(self, layer: int) -> frozenset[str]:
        """Return the parameters of a block without gradients, by name in the block.

        Names are without ".weight", as in ``saved.Block``.
        """
        return self._frozen_in.get(layer, frozenset())

    @cached_property
    def _frozen_in(self) -> dict[int | None, frozenset[str]]:
        inside: dict[int | None, set[str]] = {}
        for name in self.frozen:
            layer = layer_of(name)
            own = name.removeprefix(f"blocks.{layer}.").removesuffix(".weight")
            inside.setdefault(layer, set()).add(own)
        return {layer: frozenset(names) for layer, names in inside.items()}

    def trains(self, spec: ParamSpec) -> bool:
        """Return True if this rank's optimizer updates the parameter; copies are not updated."""
        if spec.ahead and spec.role is Role.INPUT:
            return False
        return spec.name != "embedding.weight" or self.first

    def part(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the shape of this rank's part of a parameter before ZeRO."""
        return part_before_zero(spec, self.tp, self.ep, self.whole_experts)

    def ranks_of(self, spec: ParamSpec) -> int:
        """Return the number of ranks over which ZeRO shards this parameter."""
        return max(self.shards // self.ep, 1) if spec.role in EXPERTS else self.shards

    def shard(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the shape of this rank's shard of a parameter between steps."""
        return shard(self.part(spec), self.ranks_of(spec))

    def held(self, spec: ParamSpec) -> int:
        """Return the number of elements of this rank's shard between steps."""
        return math.prod(self.shard(spec))

    @cached_property
    def by_layer(self) -> Counter[int | None]:
        """Elements of trained parameters by layer, before ZeRO; None: outside blocks."""
        sizes: Counter[int | None] = Counter()
        for spec, size in self.trained.items():
            sizes[layer_of(spec.name)] += size
        return sizes

    @cached_property
    def units(self) -> dict[str, int]:
        """Elements of trained parameters by FSDP2 reduction unit, unsharded, by name."""
        sizes: dict[str, int] = {}
        for spec, size in self.trained.items():
            layer = layer_of(spec.name)
            unit = f"block {layer}" if layer is not None else "ends"
            if spec.role is Role.INPUT or (self.ep > 1 and spec.role in EXPERTS):
                unit = f"{unit} {'experts' if spec.role in EXPERTS else 'embedding'}"
            sizes[unit] = sizes.get(unit, 0) + size
        return sizes


@lru_cache(maxsize=512)
def _known_parts(*what: Any) -> RankParts:
    """Cache parts, which are the same for many layouts of a search and many micro-batches."""
    return RankParts(*what)
