"""Modules whose parameters are what the inventory says, and how they compute with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.scaling.roles import ParamSpec, Role


def local_weight(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, the whole where it is not distributed.

    A part that other ranks hold as well is used there on other tokens or other heads: its gradient
    is this rank's summand, which ``parallel/reduce.py`` adds to theirs at the end of a step.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=parameter.placements)


_CAST = (Role.HIDDEN, Role.EXPERT_UP, Role.EXPERT_DOWN)


class OwnsParameters(nn.Module):
    """Base of every module that owns parameters; ``specs`` says what each of them is for.

    Specs are kept by name, not on the tensor, since sharding replaces the tensors.
    """

    specs: Mapping[str, ParamSpec] = MappingProxyType({})
    _casts: Mapping[str, Tensor] | None = None

    def own(self, name: str, spec: ParamSpec) -> None:
        """Make the parameter ``self.<name>`` of this spec, in fp32.

        It is NaN until it is initialised or loaded: a model that nobody initialised must not look
        alive.
        """
        assert name not in self.specs, name
        values = torch.full(spec.shape, float("nan"), dtype=torch.float32)
        self.register_parameter(name, nn.Parameter(values))
        self.specs = {**self.specs, name: spec}

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return this rank's part of a parameter in the type of the activations."""
        if self._casts is not None and name in self._casts:
            return self._casts[name]
        return local_weight(getattr(self, name)).to(dtype)


@contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Cast the matrices of blocks to ``dtype`` now and compute with these while the context lasts.

    For pipelines: otherwise each micro-batch in flight keeps a cast weight of its own for its
    backward. Gradients go through the casts to the parameters, which must not change meanwhile,
    nor be sharded (what FSDP gathers is cast already).
    """
    owners = [module for module in model.modules() if isinstance(module, OwnsParameters)]
    for owner in owners:
        owner._casts = {
            name: local_weight(getattr(owner, name)).to(dtype)
            for name, spec in owner.specs.items()
            if spec.role in _CAST and getattr(owner, name).dtype != dtype
        }
    try:
        yield
    finally:
        for owner in owners:
            owner._casts = None
