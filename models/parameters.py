"""Base class of modules with parameters, and access to this rank's shard of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.scaling.roles import ParamSpec


def local_weight(parameter: Tensor) -> Tensor:
    """Return this rank's shard of a parameter, or the parameter itself if it is no DTensor.

    If a shard is replicated on other ranks, each rank uses it for other tokens or other heads. Its
    gradient is then this rank's partial sum, which ``parallel/reduce.py`` reduces at the end of a
    step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


class OwnsParameters(nn.Module):
    """Base class of every module with parameters; ``specs`` gives the spec of each parameter.

    ``specs`` is keyed by parameter name and not stored on the tensor, as sharding replaces tensors.
    """

    specs: Mapping[str, ParamSpec] = MappingProxyType({})

    def own(self, name: str, spec: ParamSpec) -> None:
        """Create the parameter ``self.<name>`` of this spec, in fp32, filled with NaN.

        The NaNs stay until the parameter is initialised or loaded, so that an uninitialised model
        produces NaN losses. For example, ``self.own("weight", specs["wq.weight"])``.
        """
        assert name not in self.specs, name
        values = torch.full(spec.shape, float("nan"), dtype=torch.float32)
        self.register_parameter(name, nn.Parameter(values))
        self.specs = {**self.specs, name: spec}
