"""Which part of a parameter a rank holds: how tensor, expert and ZeRO sharding cut its shape.

``parallel/tensor.py`` and ``parallel/zero.py`` do the cutting; that both agree is tested on every
preset. Parts are those of the first rank of each axis: where a cut is uneven, the largest.
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
"""Blocks whose parameters ZeRO gathers ahead of the one that computes."""


def tensor_dim(spec: ParamSpec) -> int | None:
    """Return the dimension that tensor parallelism cuts; None: every tp rank holds it whole."""
    if spec.role in EXPERTS:
        return 1 if spec.role is Role.EXPERT_UP else 2
    if spec.role is Role.VECTOR:
        return 0 if spec.of_heads else None
    if spec.role is Role.ROUTER or ".latent_" in spec.name:
        return None
    return 1 if spec.name.endswith((".wo.weight", ".down.weight")) else 0


def zero_dim(shape: tuple[int, ...], ranks: int) -> int:
    """Return the dimension of a part of this shape that ZeRO shards over ``ranks``.

    It is 0, except for experts [E, F, D] whose number the ranks do not divide: the ranks beyond E
    would hold nothing and the others whole experts. Then it is the first dimension that they
    divide, as FSDP2 pads dimension 0 alone; where there is none, it is 0 all the same.
    """
    even = [dim for dim, size in enumerate(shape) if size % ranks == 0]
    return even[0] if len(shape) == 3 and even else 0


def part_before_zero(
    spec: ParamSpec, tp: int, ep: int, whole_experts: bool = False
) -> tuple[int, ...]:
    """Return the shape of a rank's part where expert and tensor parallelism alone cut."""
    shape = list(spec.shape)
    whole = whole_experts and spec.role in EXPERTS
    if spec.role in EXPERTS:
        shape[0] //= ep * tp if whole else ep
    dim = tensor_dim(spec)
    if dim is not None and not whole:
        shape[dim] = -(-shape[dim] // tp)
    return tuple(shape)


def shard(shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """Return the shape of the first rank's shard of such a part."""
    dim = zero_dim(shape, ranks)
    return (*shape[:dim], -(-shape[dim] // ranks), *shape[dim + 1 :])


def has_experts(model: ModelConfig, layer: int) -> bool:
    """Return whether this layer of a model has experts."""
    return isinstance(model, MoEModel) and model.has_experts(layer)


@dataclass(frozen=True)
class RankParts:
    """What one rank holds of a model: some layers, the ends or not, cut over tp, ep and ZeRO.

    ``shards``: ranks over which ZeRO shards one copy, 1 at stage 0. ``frozen``: names of the
    model's parameters that have no gradients (``overrides.frozen_names``).
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
        """Return what a pipeline rank holds; ``layout`` None: the whole model, not cut."""
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
        """Return the parameters that lie here, the copy of a tied embedding included."""
        return self._specs_of(self.layers)

    def _specs_of(self, layers: Iterable[int]) -> tuple[ParamSpec, ...]:
        # A tied head away from its embedding is a copy of it.
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
        """One parameter of those that are alike in layers of a kind, and how many they are."""
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
        """The same of those parameters that have gradients."""
        if not self.frozen:
            return self.sizes
        return {spec: size for spec, size in self.sizes.items() if spec.name not in self.frozen}

    def frozen_in(self, layer: int) -> frozenset[str]:
        """Return which parameters of a block have no gradients, by their names in it.

        Those are without ".weight", as ``saved.Block`` has them.
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
        """Return whether the optimizer of this rank has the parameter: copies have none."""
        if spec.ahead and spec.role is Role.INPUT:
            return False
        return spec.name != "embedding.weight" or self.first

    def part(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the shape of this rank's part of a parameter before ZeRO."""
        return part_before_zero(spec, self.tp, self.ep, self.whole_experts)

    def ranks_of(self, spec: ParamSpec) -> int:
        """Return over how many ranks ZeRO shards this parameter."""
        return max(self.shards // self.ep, 1) if spec.role in EXPERTS else self.shards

    def shard(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the shape of what this rank holds of a parameter between steps."""
        return shard(self.part(spec), self.ranks_of(spec))

    def held(self, spec: ParamSpec) -> int:
        """Return the elements that this rank holds between steps."""
        return math.prod(self.shard(spec))

    @cached_property
    def by_layer(self) -> Counter[int | None]:
        """Elements of the trained parameters of each block, before ZeRO; None: of the ends."""
        sizes: Counter[int | None] = Counter()
        for spec, size in self.trained.items():
            sizes[layer_of(spec.name)] += size
        return sizes

    @cached_property
    def units(self) -> dict[str, int]:
        """Elements of what FSDP2 reduces at once, of trained parameters, whole, by its name."""
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
    """Make parts once: many layouts of a search, and many micro-batches, have the same."""
    return RankParts(*what)
