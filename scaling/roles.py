"""Roles of parameters, which determine their scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


@dataclass(frozen=True, slots=True)
class Normal:
    """Initial values from N(0, ``std``²)."""

    std: float


Start = Literal["ones", "zeros"] | Normal


class Role(StrEnum):
    """Growth of a parameter's dimensions with the model (arXiv 2203.03466, Table 8).

    ``input``: only fan-out grows with width (embeddings). ``hidden``: both grow. ``output``: only
    fan-in grows (the head). ``vector``: one growing dimension and no product (norm gains, biases).
    ``router``, ``expert_up`` and ``expert_down`` belong to mixtures of experts.
    """

    INPUT = "input"
    HIDDEN = "hidden"
    OUTPUT = "output"
    VECTOR = "vector"
    ROUTER = "router"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"


EXPERTS = (Role.EXPERT_UP, Role.EXPERT_DOWN)
MATRICES = frozenset({Role.HIDDEN, Role.ROUTER, *EXPERTS})
"""Roles between embedding and head whose weights are multiplied with activations."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """Specification of a parameter, as declared by its module.

    ``name`` is the dotted global name, ``shape`` the unsharded shape. Weights are stored [fan_out,
    fan_in]; an embedding [V, D] has fan_in V (constant) and fan_out D; a vector [n] has fan_in 1
    and fan_out n. ``start``: initial value in every parameterization; None: the parameterization
    decides. ``of_heads``: a vector with elements for each head, sharded with the heads. ``ahead``:
    a parameter of multi-token prediction, which published counts and laws leave out. For example,
    ``ParamSpec("head.weight", Role.OUTPUT, (V, D), fan_in=D, fan_out=V)``.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    start: Start | None = None
    of_heads: bool = False
    ahead: bool = False

    def __post_init__(self) -> None:
        assert all(size > 0 for size in self.shape), (self.name, self.shape)
        assert min(self.fan_in, self.fan_out) > 0, (self.name, self.fan_in, self.fan_out)
        assert self.start is not None or self.role is not Role.VECTOR, self.name

    @property
    def in_block(self) -> bool:
        """True if the parameter belongs to a block; the number of blocks is the model's depth."""
        return self.name.startswith("blocks.")

    @property
    def numel(self) -> int:
        """Number of elements of the unsharded parameter."""
        return math.prod(self.shape)


def layer_of(name: str) -> int | None:
    """Return the layer of a parameter; None for embedding, final norm and head.

    >>> layer_of("blocks.3.ffn.up.weight")
    3
    """
    return int(name.split(".")[1]) if name.startswith("blocks.") else None
