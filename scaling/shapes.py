"""Models of a family at other sizes."""

from __future__ import annotations

import math
from contextlib import suppress
from enum import StrEnum
from fractions import Fraction
from typing import Any

from pydantic import ValidationError

from allometry.configs.errors import UserError
from allometry.configs.model import (
    MSSP,
    LatentExperts,
    ModelConfig,
    MoEModel,
    ParameterizationConfig,
)


class Axis(StrEnum):
    """Varied quantity of the models (or, for ``horizon`` and ``batch``, the runs) of a family."""

    WIDTH = "width"
    DEPTH = "depth"
    WIDTH_AND_DEPTH = "width-and-depth"
    EXPERTS = "experts"
    REGIME_II = "regime-ii"
    REGIME_III = "regime-iii"
    HORIZON = "horizon"
    BATCH = "batch"

    @property
    def of_runs(self) -> bool:
        """True if the run changes instead of the model."""
        return self in (Axis.HORIZON, Axis.BATCH)


def at_width(model: ModelConfig, width: int) -> ModelConfig:
    """Return the same model at another width, all widths in proportion, head width constant.

    The numbers of experts and of visited experts are constant; expert widths grow. Raises UserError
    if heads or a feed-forward cannot be scaled to integers. For example, doubling the width doubles
    ``num_heads`` and ``ffn_width``.
    """
    latent = model.latent_attention
    changes: dict[str, Any] = {} if latent is not None else {"head_dim": model.head_width}
    inner: dict[str, dict[str, Any]] = {"": changes, "experts": {}, "latent_attention": {}}
    for key, size in _widths(model).items():
        scaled, rest = divmod(size * width, model.width)
        if rest or not scaled:
            raise UserError(
                f"model.{key}={size} cannot be scaled from width={model.width} to width={width}; "
                f"choose multiples of {width_unit(model)}"
            )
        section, _, name = key.rpartition(".")
        inner[section][name] = scaled
    if isinstance(model, MoEModel):
        changes["experts"] = model.experts.model_copy(update=inner["experts"])
    if latent is not None:
        changes["latent_attention"] = latent.model_copy(update=inner["latent_attention"])
    return model.model_copy(update=changes)


def at_depth(model: ModelConfig, layers: int) -> ModelConfig:
    """Return the same model with another number of layers; raise UserError if it is invalid."""
    return _checked(model, {"num_layers": layers}, f"{layers} layers")


def at_width_and_depth(model: ModelConfig, width: int) -> ModelConfig:
    """Return the model at another width with a proportional number of layers.

    Raises UserError if the model is invalid.
    """
    layers, rest = divmod(model.num_layers * width, model.width)
    if rest or not layers:
        raise UserError(
            f"model.num_layers={model.num_layers} cannot be scaled from width={model.width} to "
            f"width={width}; choose multiples of {width_and_depth_unit(model)}"
        )
    return at_depth(at_width(model, width), layers)


def at_experts(model: ModelConfig, number: int) -> ModelConfig:
    """Return the same mixture with another number of routed experts; visits per token are constant.

    Raises UserError for a model without experts, or an invalid number.
    """
    experts = _mixture(model).experts.model_dump() | {"num_experts": number}
    return _checked(model, {"experts": experts}, f"{number} experts")


def at_regime(model: ModelConfig, number: int, *, widen_experts: bool) -> ModelConfig:
    """Return the mixture with ``number`` routed experts, and other dimensions scaled with it.

    Width and experts per token grow in the same proportion. In regime II of MSSP (arXiv 2605.14200)
    expert widths are constant, and in regime III they grow too. Raises UserError for a model
    without experts, and for fractional dimensions.
    """
    experts = _mixture(model).experts
    width, rest = divmod(model.width * number, experts.num_experts)
    visits, part = divmod(experts.experts_per_token * number, experts.num_experts)
    if rest or part or not visits:
        raise UserError(
            f"model.width={model.width} and model.experts.experts_per_token="
            f"{experts.experts_per_token} cannot be scaled from num_experts={experts.num_experts} "
            f"to {number}; choose multiples of {experts.num_experts}"
        )
    wide = _mixture(at_width(model, width))
    grown = wide.experts.model_dump() | {"num_experts": number, "experts_per_token": visits}
    if not widen_experts:
        grown["width"] = experts.width
    return _checked(wide, {"experts": grown}, f"{number} experts")


def resize(model: ModelConfig, axis: Axis, size: int) -> ModelConfig:
    """Return the model at ``size`` of an axis; horizon and batch do not change the model.

    For example, ``resize(model, Axis.WIDTH, 1024)``.
    """
    match axis:
        case Axis.WIDTH:
            return at_width(model, size)
        case Axis.DEPTH:
            return at_depth(model, size)
        case Axis.WIDTH_AND_DEPTH:
            return at_width_and_depth(model, size)
        case Axis.EXPERTS:
            return at_experts(model, size)
        case Axis.REGIME_II | Axis.REGIME_III:
            return at_regime(model, size, widen_experts=axis is Axis.REGIME_III)
        case Axis.HORIZON | Axis.BATCH:
            return model


def width_unit(model: ModelConfig) -> int:
    """Return the smallest valid width of the model; its multiples are valid as well."""
    # size·w/width is an integer if w is a multiple of the numerator of width/size.
    return math.lcm(*(Fraction(model.width, size).numerator for size in _widths(model).values()))


def width_and_depth_unit(model: ModelConfig) -> int:
    """Return the smallest width at which the model with a proportional depth is valid."""
    return math.lcm(width_unit(model), Fraction(model.width, model.num_layers).numerator)


def regime_unit(model: ModelConfig) -> int:
    """Return the smallest number of experts to which ``at_regime`` scales; multiples are valid too.

    Raises UserError for a model without experts.
    """
    whole = _mixture(model).experts.num_experts
    for number in range(1, whole):
        with suppress(UserError):
            at_regime(model, number, widen_experts=True)
            return number
    return whole


def growth_axis(parameterization: ParameterizationConfig) -> Axis:
    """Return the growth axis of a family: width, or experts in MSSP's regimes II and III."""
    if not isinstance(parameterization, MSSP) or parameterization.regime == "I":
        return Axis.WIDTH
    return Axis.REGIME_II if parameterization.regime == "II" else Axis.REGIME_III


def tuning_width(model: ModelConfig, least: int = 256) -> int:
    """Return a width for tuning: the smallest valid one from ``least`` on, at most the model's."""
    unit = width_unit(model)
    return min(model.width, unit * max(1, -(-least // unit)))


def _mixture(model: ModelConfig) -> MoEModel:
    if not isinstance(model, MoEModel):
        raise UserError(
            "model.kind=dense has no experts to vary; leave experts out or take a mixture"
        )
    return model


def _widths(model: ModelConfig) -> dict[str, int]:
    """Return the dimensions proportional to the width, by key of the model section."""
    sizes = {"width": model.width, "num_heads": model.num_heads, "num_kv_heads": model.kv_heads}
    latent = model.latent_attention
    if latent is not None:
        sizes["latent_attention.kv_lora_rank"] = latent.kv_lora_rank
        if latent.q_lora_rank is not None:
            sizes["latent_attention.q_lora_rank"] = latent.q_lora_rank
    if model.ffn_width is not None:
        sizes["ffn_width"] = model.ffn_width
    if isinstance(model, MoEModel):
        sizes["experts.width"] = model.experts.width
        if isinstance(model.experts, LatentExperts):
            sizes["experts.latent_width"] = model.experts.latent_width
    return sizes


def _checked(model: ModelConfig, changes: dict[str, Any], what: str) -> ModelConfig:
    try:
        return type(model).model_validate(model.model_dump() | changes)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"the model cannot have {what}: {reason}") from None
