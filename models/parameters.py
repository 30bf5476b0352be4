"""Modules whose parameters are what the inventory says."""

from __future__ import annotations

import torch
from torch import nn

from allometry.scaling.roles import ParamSpec


class OwnsParameters(nn.Module):
    """Base of every module that owns parameters; ``specs`` says what each of them is for.

    Specs are kept by name, not on the tensor, since sharding replaces the tensors.
    """

    specs: dict[str, ParamSpec]

    def own(self, name: str, spec: ParamSpec) -> None:
        """Make the parameter ``self.<name>`` of this spec, in fp32.

        It is NaN until it is initialised or loaded: a model that nobody initialised must not look
        alive.
        """
        if "specs" not in self.__dict__:
            self.specs = {}
        assert name not in self.specs, name
        values = torch.full(spec.shape, float("nan"), dtype=torch.float32)
        self.register_parameter(name, nn.Parameter(values))
        self.specs[name] = spec
