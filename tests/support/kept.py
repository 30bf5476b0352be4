"""Bytes that autograd saves for a block, except parameters, buffers, rotations, cast weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allometry.configs.model import ModelConfig, StandardParameterization
from allometry.models.build import build_model, torch_dtype
from allometry.models.init import initialize
from allometry.models.moe import begin_step
from allometry.models.products import cast_once, stacks
from allometry.scaling.parameterization import Parameterization


def kept_of_block(
    config: ModelConfig,
    compute: str,
    tokens_BL: Tensor,
    run: Callable[[Any, Tensor, Any], Any] = lambda block, x_BLD, geometry: block(x_BLD, geometry),
) -> tuple[int, int]:
    """Return (bytes saved by ``run(block 0, x, geometry)``, bytes of copied gains among them)."""
    rules = Parameterization(StandardParameterization(), config)
    made = build_model(config, rules, compute)
    initialize(made, rules, seed=0)
    begin_step(made, tokens_BL.numel())
    dtype, block = torch_dtype(compute), made.blocks["0"]
    x_BLD = torch.randn(*tokens_BL.shape, config.width, dtype=dtype).requires_grad_()
    geometry = made._geometry(tokens_BL, None)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with cast_once(made, dtype):
        copies = [s.copy for s in stacks(made) if s.copy is not None]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(block, x_BLD, geometry)
        held = [*made.state_dict().values(), *geometry.turn, *geometry.windowed, *copies]
        owned = {tensor.untyped_storage().data_ptr() for tensor in held}
    found = [tensor for place, tensor in kept.items() if place not in owned]
    sizes = [tensor.untyped_storage().nbytes() for tensor in found]
    gains = [
        size
        for tensor, size in zip(found, sizes, strict=True)
        if tensor.dim() == 1 and tensor.is_floating_point()
    ]
    return sum(sizes), sum(gains)
