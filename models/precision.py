"""Apply the ``precision`` config section to a model."""

from __future__ import annotations

import torch

from allometry.configs.precision import PrecisionConfig
from allometry.models import fp8
from allometry.models.layers import RMSNorm
from allometry.models.products import Stacked
from allometry.models.router import Router
from allometry.models.transformer import Transformer
from allometry.scaling.roles import EXPERTS, MATRICES, Role


def use_precision(
    model: Transformer, precision: PrecisionConfig, linears: str | None = None
) -> None:
    """Set how a model saves activations and multiplies; call before wrapping or compiling it.

    ``linears``: the recipe of the FP8 products, e.g. "fp8_rowwise". None means
    ``precision.linears``, with "compute" in place of "auto".
    """
    if linears is None:
        linears = "compute" if precision.linears == "auto" else precision.linears
    saves = precision.saved_activations == "fp8"
    for module in model.modules():
        if isinstance(module, RMSNorm | Router):
            module.saves = saves

    def gradient(role: Role) -> torch.dtype:
        # Products of experts have one scale for each row.
        recipe = "fp8_rowwise" if role in EXPERTS else linears
        return fp8.gradient_type(recipe, precision.gradients)

    for layer, block in model.blocks.items():
        high = linears == "compute" or int(layer) in precision.compute_layers
        for module in block.modules():
            for stacked in vars(module).values():
                if isinstance(stacked, Stacked) and stacked.role in MATRICES:
                    stacked.saves = saves
                    if not high and stacked.role in precision.roles:
                        stacked.recipe = linears
                        stacked.gradients = gradient(stacked.role)


def inputs_by_role(model: Transformer) -> dict[Role, list[Stacked]]:
    """Return the ``Stacked`` products in a model's blocks, by the role of their weights."""
    found: dict[Role, list[Stacked]] = {}
    for module in model.blocks.modules():
        for stacked in vars(module).values():
            if isinstance(stacked, Stacked):
                found.setdefault(stacked.role, []).append(stacked)
    return found
