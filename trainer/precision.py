"""Choose the recipe of ``precision.linears`` that a device can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.models import fp8
from allometry.scaling.inventory import inventory
from allometry.scaling.precision import cut_widths

PREFERRED = ("fp8_rowwise", "fp8_tensorwise")
"""Recipes that ``auto`` tries in turn on CUDA, before compute."""

_LEAST_CAPABILITY = {"fp8_tensorwise": (8, 9), "fp8_rowwise": (9, 0), "fp8_blockwise": (9, 0)}


@dataclass(frozen=True)
class Device:
    """Properties of a device that decide; ``capability`` is None without CUDA: FP8 is emulated."""

    name: str
    capability: tuple[int, int] | None
    scaled_mm: bool = hasattr(torch, "_scaled_mm")
    scaled_grouped_mm: bool = hasattr(torch, "_scaled_grouped_mm")

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Return the properties of a device of this machine."""
        if device.type != "cuda":
            return cls(device.type, None)
        return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def refusal(recipe: str, config: RunConfig, tp: int, device: Device) -> str | None:
    """Return why this device cannot run a recipe, with a fix; None if it can."""
    if recipe == "compute" or device.capability is None:
        return None
    least = _LEAST_CAPABILITY[recipe]
    if device.capability < least:
        have = ".".join(map(str, device.capability))
        return (
            f"needs a GPU of compute capability {least[0]}.{least[1]}, but {device.name} has {have}"
        )
    if not device.scaled_mm:
        return f"needs torch._scaled_mm, which torch {torch.__version__} lacks; install torch 2.7"
    if config.training.compute_dtype != "bf16":
        return f"needs training.compute_dtype=bf16, not {config.training.compute_dtype}"
    experts = [role for role in config.precision.roles if role.startswith("expert")]
    if config.model.kind == "moe" and experts:
        reason = _refusal_of_experts(recipe, config, device)
        return reason or _odd_width(recipe, config, tp)
    return _odd_width(recipe, config, tp)


def _refusal_of_experts(recipe: str, config: RunConfig, device: Device) -> str | None:
    fix = "set precision.roles: [hidden]"
    if recipe == "fp8_blockwise":
        return f"has no grouped product for experts in torch {torch.__version__}; {fix}"
    if not device.scaled_grouped_mm or (device.capability or (0, 0)) < (9, 0):
        return (
            "needs torch._scaled_grouped_mm on compute capability 9.0 for experts, but "
            f"{device.name} with torch {torch.__version__} has none; {fix}"
        )
    if fp8.gradient_type("fp8_rowwise", config.precision.gradients) != fp8.E4M3:
        return f"multiplies experts' gradients as e4m3 alone; unset precision.gradients or {fix}"
    return None


def _odd_width(recipe: str, config: RunConfig, tp: int) -> str | None:
    multiple = 128 if recipe == "fp8_blockwise" else 16
    sizes = {
        spec.name: size
        for spec in inventory(config.model)
        if spec.role in config.precision.roles
        for size in spec.shape[-2:]
        if size % multiple
    }
    sizes |= {
        f"{name} over parallel.tp={tp}": size // tp
        for name, size in cut_widths(config.model).items()
        if size // tp % multiple
    }
    for name, size in sizes.items():
        return f"needs widths that are multiples of {multiple}, but {name} has {size}"
    return None


def choose(
    config: RunConfig, tp: int, device: torch.device, before: str | None = None
) -> tuple[str, Literal["named", "record", "rule"], dict[str, str]]:
    """Return (recipe, how it was chosen, excluded recipes with reasons) for this device.

    Raises UserError if the recipe named by ``precision.linears`` cannot run or fails. For example,
    ``precision.linears: auto`` on a GPU of compute capability 8.9 gives ``fp8_tensorwise`` by rule,
    with the reason against ``fp8_rowwise``.
    """
    asked = config.precision.linears
    if asked == "compute":
        return asked, "named", {}
    found = Device.of(device)

    def refused(recipe: str) -> str | None:
        reason = refusal(recipe, config, tp, found)
        return reason if reason is not None else _failure(recipe, config, device)

    if asked != "auto":
        reason = refused(asked)
        if reason is not None:
            raise UserError(
                f"precision.linears={asked} {reason}; or use precision.linears: auto or compute"
            )
        return asked, "named", {}
    left_out: dict[str, str] = {}
    for recipe in _candidates(before, found):
        reason = refused(recipe)
        if reason is None:
            return recipe, "record" if recipe == before else "rule", left_out
        left_out[recipe] = reason
    return "compute", "rule", left_out


def _candidates(before: str | None, device: Device) -> Iterator[str]:
    if before is not None:
        yield before
    # Emulated FP8 is slower than computing without FP8.
    yield from PREFERRED if device.capability is not None else ()


def _failure(recipe: str, config: RunConfig, device: torch.device) -> str | None:
    """Return the failure of small matrix products of each kind, None if all are correct."""
    if recipe == "compute" or device.type != "cuda":
        return None
    gradients = fp8.gradient_type(recipe, config.precision.gradients)
    try:
        for dtype in {fp8.E4M3, gradients}:
            a = torch.ones(256, 512, dtype=torch.bfloat16, device=device)
            left = fp8.quantise(a, fp8.ACTIVATION_BLOCKS[recipe], dtype)
            right = fp8.quantise(a, fp8.WEIGHT_BLOCKS[recipe])
            made = fp8.scaled_product(left, right, recipe, torch.bfloat16)
            if not bool((made == 512.0).all()):
                return f"gives wrong products on this device with torch {torch.__version__}"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"fails on this device with torch {torch.__version__} ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
