"""Modules whose parameters are what the inventory says, and how they compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from allometry.scaling.roles import ParamSpec


def local_weight(parameter: Tensor) -> Tensor:
    """Return this rank's part of a parameter, the whole where it is not distributed.

    A part that other ranks hold as well is used there on other tokens or other heads, so its
    gradient is marked as this rank's summand.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    summands = [Partial() if p.is_replicate() else p for p in parameter.placements]
    return parameter.to_local(grad_placements=summands)


class OwnsParameters(nn.Module):
    """Base of every module that owns parameters; ``specs`` says what each of them is for.

    Specs are kept by name, not on the tensor, since sharding replaces the tensors.
    """

    specs: dict[str, ParamSpec]
    _casts: dict[str, Tensor] | None = None

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

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return this rank's part of a parameter in the type of the activations."""
        weight = local_weight(getattr(self, name))
        # Compiled code keeps the parameter and casts it again in the backward.
        if self._casts is None or weight.dtype == dtype or torch.compiler.is_compiling():
            return weight.to(dtype)
        if name not in self._casts:
            self._casts[name] = weight.to(dtype)
        assert self._casts[name].dtype == dtype, (name, dtype)
        return self._casts[name]


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """Let each parameter be cast once while the context lasts, with gradients.

    For pipelines: otherwise each micro-batch in flight keeps a cast weight of its own for its
    backward. Parameters must not change meanwhile.
    """
    owners = [module for module in model.modules() if isinstance(module, OwnsParameters)]
    for owner in owners:
        owner._casts = {}
    try:
        yield
    finally:
        for owner in owners:
            owner._casts = None
