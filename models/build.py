"""From a model's description to modules, and from modules to their parameters' specs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from allometry.configs.model import ModelConfig
from allometry.models.moe import MoETransformer
from allometry.models.parameters import OwnsParameters
from allometry.models.transformer import Part, Transformer
from allometry.scaling.inventory import inventory
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

    Its parameters are fp32 NaNs until ``initialize`` or a checkpoint fills them. Those that are
    frozen require no gradient.
    """
    build = _BUILDERS[model.kind]
    built = build(model, parameterization.forward, torch_dtype(compute_dtype), part)
    kept = built.part
    listed = inventory(model, kept.layers, first=kept.first, last=kept.last)
    specs = parameter_specs(built)
    assert tuple(specs.values()) == listed, "modules and inventory differ"
    for name, _, _, parameter in named_parameters(built):
        parameter.requires_grad_(not parameterization.resolve(specs[name]).frozen)
    return built


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
    """Return what each parameter is for, by full name, in ``named_parameters()`` order.

    Shapes are those of whole parameters, also where only a shard is here or nothing. Raises
    ``ValueError`` for a parameter that its module does not own by a spec.
    """
    specs = {}
    for full, owner, name, parameter in named_parameters(module):
        spec = owner.specs.get(name) if isinstance(owner, OwnsParameters) else None
        if spec is None:
            raise ValueError(
                f"parameter {full!r} of {type(owner).__name__} has no spec; the module that makes "
                "a parameter must own it (allometry.models.parameters)"
            )
        here = tuple(parameter.shape)
        assert here in (spec.shape, (0,)), (full, here, spec.shape)
        specs[full] = spec
    return specs
