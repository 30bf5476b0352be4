"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and scalings for longer sequences."""

# B batch, L length, N heads, H head width, h: rotated pairs of a head, at most H/2

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allometry.configs.decoder import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from allometry.models.documents import Documents


class Turn(NamedTuple):
    """Cosines and sines of all tokens' rotation angles, [B, L, 1, h]."""

    cos_BL1h: Tensor
    sin_BL1h: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Geometry:
    """Rotations and document boundaries of a batch, shared by all blocks.

    ``windowed``: the rotations in layers with an attention window. Geometry is deliberately not a
    tuple: FSDP2 casts every float tensor it finds among a module's inputs, and the cosines and
    sines must not be cast.
    """

    turn: Turn
    windowed: Turn
    documents: Documents | None


def turn_of(
    positions_BL: Tensor,
    theta: float,
    scaling: RopeScaling | None,
    *,
    rotary_width: int,
    dtype: torch.dtype,
) -> Turn:
    """Return cosines and sines for ``rotate``, for tokens at these positions.

    YaRN's attention factor multiplies both tables, and so both queries and keys.
    """
    angles = rotary_angles(positions_BL, rotary_width, theta, dtype, scaling)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    if isinstance(scaling, YarnScaling):
        cos, sin = cos * attention_factor(scaling), sin * attention_factor(scaling)
    return Turn(cos, sin)


def rotary_angles(
    positions: Tensor,
    rotary_width: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """Return angles [*positions, h]: position * frequency.

    Computed in fp32, or in fp64 if ``dtype`` is fp64. No table is stored, so a model built on the
    meta device loses no buffer and any position is allowed.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies_h = frequencies(rotary_width, theta, scaling, positions.device).to(wide)
    return positions[..., None].to(wide) * frequencies_h


def frequencies(
    rotary_width: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Return fp64 [h]: f_i = theta**(-2i/H), scaled as ``scaling`` specifies.

    linear: f_i / s (arXiv 2306.15595). llama3 and yarn: f_i (k_i + (1 - k_i) / s), with k_i in
    [0, 1] from ``_kept_by_wavelength`` and ``_kept_by_turns``; s is ``factor``. For example, width
    4 and theta 10000 without scaling give [1, 0.01].
    """
    even = torch.arange(0, rotary_width, 2, device=device, dtype=torch.float64)
    plain_h = theta ** (-even / rotary_width)
    match scaling:
        case None:
            return plain_h
        case LinearScaling():
            return plain_h / scaling.factor
        case Llama3Scaling():
            kept_h = _kept_by_wavelength(plain_h, scaling)
        case YarnScaling():
            kept_h = _kept_by_turns(rotary_width, theta, scaling, device)
    return plain_h * (kept_h + (1.0 - kept_h) / scaling.factor)


def _kept_by_wavelength(plain_h: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Return k_i [h] of llama3: a ramp in the number of wavelengths in ``original_length``."""
    turns_h = scaling.original_length * plain_h / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns_h - low) / (high - low)).clamp(0.0, 1.0)


def _kept_by_turns(
    rotary_width: int, theta: float, scaling: YarnScaling, device: torch.device
) -> Tensor:
    """Return k_i [h], the kept share of each frequency (YaRN, arXiv 2309.00071, eq. 17-23).

    Frequency number d(t) = H ln(M / (2 pi t)) / (2 ln theta) makes t full rotations in the M tokens
    of ``original_length``. k_i = 1 - clamp((i - low) / (high - low), 0, 1) between low =
    d(``beta_fast``) and high = d(``beta_slow``), rounded down and up if ``truncate`` is set.
    """

    def number_with(turns: float) -> float:
        ratio = scaling.original_length / (turns * 2 * math.pi)
        return rotary_width * math.log(ratio) / (2 * math.log(theta))

    low, high = number_with(scaling.beta_fast), number_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_width - 1)
    number_h = torch.arange(rotary_width // 2, device=device, dtype=torch.float64)
    return 1.0 - ((number_h - low) / max(high - low, 1e-3)).clamp(0.0, 1.0)


def attention_factor(scaling: YarnScaling) -> float:
    """Return YaRN's factor on rotated queries and keys (arXiv 2309.00071, section 3.4)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0


def rotate(x_BLNH: Tensor, cos_BL1h: Tensor, sin_BL1h: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + h]) by its angle: the half-split layout of Llama in HF.

    If 2h < H, components from 2h on are not rotated (``partial_rotary_factor`` in HF). Computed in
    the type of ``cos``: bf16 would lose the angles of distant positions.
    """
    turning = 2 * cos_BL1h.shape[-1]
    first, second = x_BLNH[..., :turning].chunk(2, dim=-1)
    turned = (
        first * cos_BL1h - second * sin_BL1h,
        second * cos_BL1h + first * sin_BL1h,
    )
    if turning < x_BLNH.shape[-1]:
        turned = (*turned, x_BLNH[..., turning:])
    return torch.cat(turned, dim=-1).to(x_BLNH.dtype)
