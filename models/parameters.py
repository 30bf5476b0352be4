"""Modules whose parameters are what the inventory says, and how they compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.scaling.roles import ParamSpec


def local_weight(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, the whole where it is not distributed.

    A part that other ranks hold as well is used there on other tokens or other heads: its gradient
    is this rank's summand, which ``parallel/reduce.py`` adds to theirs at the end of a step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


class OwnsParameters(nn.Module):
    """Base of every module that owns parameters; ``specs`` says what each of them is for.

    Specs are kept by name, not on the tensor, since sharding replaces the tensors.
    """

    specs: Mapping[str, ParamSpec] = MappingProxyType({})

    def own(self, name: str, spec: ParamSpec) -> None:
        """Make the parameter ``self.<name>`` of this spec, in fp32.

        It is NaN until it is initialised or loaded: a model that nobody initialised must not look
        alive.
        """
        assert name not in self.specs, name
        values = torch.full(spec.shape, float("nan"), dtype=torch.float32)
        self.register_parameter(name, nn.Parameter(values))
        self.specs = {**self.specs, name: spec}
