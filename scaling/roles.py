"""What each parameter is for: the facts that decide how it scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Start = Literal["ones", "zeros"]


class Role(StrEnum):
    """How a parameter's dimensions grow with the model (arXiv 2203.03466, Table 8).

    ``input``: only fan-out grows with width (embeddings). ``hidden``: both do. ``output``: only
    fan-in does (the head). ``vector``: one growing dimension and no product (norm gains, biases).
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
"""The roles between embedding and head whose weights are multiplied with activations."""


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter as the module that makes it declares it.

    ``name`` is its full dotted name in the model, ``shape`` its whole (unsharded) shape. Weights
    are stored [fan_out, fan_in]; an embedding [V, D] has fan_in V (finite) and fan_out D; a vector
    [n] has fan_in 1 and fan_out n. ``start``: what it starts as in every parameterization; None:
    that decides. ``of_heads``: a vector with elements for each head, which are where the head is.
    ``ahead``: of multi-token prediction, which published counts and laws leave out.
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
        """Whether the parameter is one of a block, whose number is the model's depth."""
        return self.name.startswith("blocks.")

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


def layer_of(name: str) -> int | None:
    """Return the layer whose parameter this is; None: of embedding, final norm or head."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None
