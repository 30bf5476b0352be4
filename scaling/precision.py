"""FP8 constraints on a layout: elements that share a scale must be on the same rank."""

from __future__ import annotations

from allometry.configs.errors import UserError
from allometry.configs.model import ModelConfig, MoEModel
from allometry.configs.run import RunConfig
from allometry.scaling.degrees import Degrees
from allometry.scaling.inventory import inventory
from allometry.scaling.roles import Role

SAVED_GROUP = 16
"""Elements of a row with one scale in activations saved for backward (COAT, arXiv 2410.19313)."""

SAVED_BYTES = 1 + 2 / SAVED_GROUP
"""Bytes per element saved in FP8, including its share of a bf16 scale."""

_BLOCK = 128


def cut_widths(model: ModelConfig) -> dict[str, int]:
    """Return the widths that tensor parallelism shards and products sum over, by key."""
    latent = model.latent_attention is not None
    values = "model.latent_attention.v_head_dim" if latent else "model.head_dim"
    cut = {f"model.num_heads x {values}": model.num_heads * model.value_width}
    if model.ffn_width is not None:
        cut["model.ffn_width"] = model.ffn_width
    if isinstance(model, MoEModel):
        cut["model.experts.width"] = model.experts.width
        if model.experts.num_shared_experts:
            cut["width of the shared experts"] = (
                model.experts.width * model.experts.num_shared_experts
            )
    return cut


def _check_gather(config: RunConfig, degrees: Degrees) -> None:
    """Reject a layout whose parameters cannot be gathered in FP8."""
    if config.precision.gather != "fp8":
        return
    model, zero = config.model, config.parallel.zero
    shards = degrees.hdp // zero.replicas
    reason = None
    if model.kind == "moe":
        reason = "experts have a scale for each row (model.kind=moe)"
    elif degrees.tp > 1:
        reason = f"parallel.tp={degrees.tp} leaves a rank parts of weights"
    elif zero.stage == 0:
        reason = "parallel.zero.stage=0 gathers no parameters"
    elif zero.offload == "cpu":
        reason = "parallel.zero.offload=cpu keeps shards where they are not rounded"
    for spec in inventory(model):
        if reason is None and spec.role is Role.HIDDEN and spec.shape[0] % shards:
            reason = f"{shards} ranks do not share the {spec.shape[0]} rows of {spec.name} evenly"
    if reason is not None:
        raise UserError(f"precision.gather=fp8 cannot be: {reason}; use precision.gather: compute")


def _check_some_product(config: RunConfig) -> None:
    """Reject a recipe that no product of the model uses."""
    precision, model = config.precision, config.model
    if precision.linears in ("compute", "auto"):
        return
    recipe, reason = f"precision.linears={precision.linears}", None
    if not {spec.role.value for spec in inventory(model)} & set(precision.roles):
        roles = ", ".join(precision.roles)
        reason = f"no weight of a {model.kind} model has a role of precision.roles=[{roles}]"
    elif set(range(model.num_layers)) <= set(precision.compute_layers):
        reason = "precision.compute_layers names every layer"
    if reason is not None:
        raise UserError(
            f"{recipe} would make no product in FP8: {reason}; name others or use "
            "precision.linears: compute"
        )


def check_precision(config: RunConfig, degrees: Degrees) -> None:
    """Reject a layout in which scales cover other elements than on one rank."""
    tp = degrees.tp
    _check_gather(config, degrees)
    precision, model = config.precision, config.model
    past = [layer for layer in precision.compute_layers if layer >= model.num_layers]
    if past:
        raise UserError(
            f"precision.compute_layers={list(precision.compute_layers)} names layer {past[0]}, but "
            f"model.num_layers={model.num_layers}; layers are counted from 0"
        )
    _check_some_product(config)
    if tp > 1 and model.qk_norm_over == "width" and precision.saved_activations == "fp8":
        raise UserError(
            "precision.saved_activations=fp8 keeps what norms read with the sums of whole rows, "
            f"which model.qk_norm_over=width parts over parallel.tp={tp}; use "
            "precision.saved_activations: compute or parallel.tp: 1"
        )
    asked = {
        "precision.saved_activations=fp8": SAVED_GROUP * (precision.saved_activations == "fp8"),
        "precision.linears=fp8_blockwise": _BLOCK * (precision.linears == "fp8_blockwise"),
    }
    for key, group in asked.items():
        for name, size in cut_widths(model).items():
            if tp > 1 and group and size // tp % group:
                raise UserError(
                    f"{key} scales {group} numbers together, which parallel.tp={tp} would part: "
                    f"{name}={size} over {tp} ranks is no multiple of {group}; use a smaller "
                    "parallel.tp or another width"
                )
