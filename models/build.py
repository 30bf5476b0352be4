"""From a model's description to modules, and from modules to what they declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from allometry.configs.model import ModelConfig
from allometry.models.declare import DeclaresRoles
from allometry.models.moe import MoETransformer
from allometry.models.transformer import Part, Transformer
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.parameterizations.base import ForwardScales
from allometry.scaling.roles import ParamSpec

ComputeDtype = Literal["bf16", "fp32", "fp64"]

_DTYPES: Mapping[ComputeDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

_Builder = Callable[[Any, ForwardScales, torch.dtype, Part | None], Transformer]

_BUILDERS: Mapping[str, _Builder] = {
    "dense": Transformer,
    "moe": MoETransformer,
}
"""The architecture families, by ``model.kind``."""

# What torch's wrappers put into the middle of a name.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def torch_dtype(name: ComputeDtype) -> torch.dtype:
    """Return torch's type for ``training.compute_dtype``."""
    return _DTYPES[name]


def build_model(
    model: ModelConfig,
    parameterization: Parameterization,
    compute_dtype: ComputeDtype,
    part: Part | None = None,
) -> Transformer:
    """Return the model, or a part of it, on the current default device (meta included).

    Its parameters are fp32 NaNs until ``initialize`` or a checkpoint fills them.
    """
    return _BUILDERS[model.kind](model, parameterization.forward, torch_dtype(compute_dtype), part)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (full name, owner, name in the owner, parameter), each parameter once, in order.

    Full names are those of the model as built, whatever wrappers have been put in since.
    """
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            for wrapper in _WRAPPERS:
                full = full.replace(wrapper, "")
            yield full, owner, name, parameter


def parameter_specs(module: nn.Module) -> dict[str, ParamSpec]:
    """Return what the modules declare, by full name, in ``named_parameters()`` order.

    Shapes are those of whole parameters, also where only a shard is here. Raises ``ValueError``
    for a parameter that its module does not declare.
    """
    specs = {}
    for full, owner, name, parameter in named_parameters(module):
        declared = owner.declarations.get(name) if isinstance(owner, DeclaresRoles) else None
        if declared is None:
            raise ValueError(
                f"parameter {full!r} of {type(owner).__name__} has no role; the module that makes "
                "a parameter must declare it (allometry.models.declare)"
            )
        specs[full] = ParamSpec(
            name=full,
            role=declared.role,
            shape=tuple(parameter.shape),
            fan_in=declared.fan_in,
            fan_out=declared.fan_out,
        )
    return specs
