"""Build a model from its config, and list its parameters and their specs."""

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
"""Model class of each ``model.kind``."""

# Name parts that torch's checkpoint and compile wrappers insert.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def torch_dtype(name: ComputeDtype) -> torch.dtype:
    """Return the torch dtype of ``training.compute_dtype``, e.g. ``torch.bfloat16`` for "bf16"."""
    return _DTYPES[name]


def build_model(
    model: ModelConfig,
    parameterization: Parameterization,
    compute_dtype: ComputeDtype,
    part: Part | None = None,
) -> Transformer:
    """Return the model, or a part of it, on the current default device (meta included).

    Parameters are fp32 and NaN until ``initialize`` or a checkpoint fills them. Frozen parameters
    have ``requires_grad`` False. For example,
    ``build_model(model, parameterization, "bf16", Part(range(4), last=False))`` returns the first
    four layers with the embedding.
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

    Full names are the names in the model as built, without the prefixes of wrappers.
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
    """Return the spec of each parameter by full name, in the order of ``named_parameters()``.

    Shapes are unsharded, also if this rank has only a shard or an empty tensor. Raises
    ``ValueError`` for a parameter that its module did not create with ``own``.
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
