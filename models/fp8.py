"""FP8 tensors with scales, and their matrix products: torch's kernels on CUDA, emulated elsewhere.

A scale is the largest magnitude of a block divided by the largest number of the type, so finite
inputs are never clipped. An infinity or NaN makes its block NaN and never becomes 448.
"""

# M, N rows, K columns (summed over in a product), E groups, S rows sorted by group

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allometry.scaling.precision import SAVED_GROUP

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
_LEAST_SCALE = 2.0**-126
Block = tuple[int | None, int | None]
"""Rows and columns under one scale; None means all of that dimension, e.g. (1, None): each row."""

SAVED: Block = (1, SAVED_GROUP)
ACTIVATION_BLOCKS: dict[str, Block] = {
    "fp8_tensorwise": (None, None),
    "fp8_rowwise": (1, None),
    "fp8_blockwise": (1, 128),
}
WEIGHT_BLOCKS: dict[str, Block] = {**ACTIVATION_BLOCKS, "fp8_blockwise": (128, 128)}


class Quantised(NamedTuple):
    """``values`` [..., M, K] in FP8 and ``scales`` [..., ceil(M / rows), ceil(K / columns)]."""

    values: Tensor
    scales: Tensor


def quantise(
    x: Tensor,
    block: Block,
    dtype: torch.dtype = E4M3,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantised:
    """Return x [..., M, K] rounded to ``dtype``, each block divided by its scale.

    A block of zeros stays zero; a block with an infinity or a NaN becomes NaN. For example,
    ``quantise(x, (1, 128))`` gives scales [..., M, ceil(K / 128)].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    blocks = _in_blocks(wide, block)
    largest = blocks.abs().amax(dim=(-3, -1), keepdim=True)
    # Rounded to the stored type first, so that quantise and dequantise use the same scale.
    scales = scales_of(largest, dtype).to(scale_dtype)
    values = _from_blocks(with_scale(blocks, scales, dtype), x.shape)
    return Quantised(values, scales.squeeze(-1).squeeze(-2))


def scales_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales of blocks with the largest magnitudes ``largest``, fp32 or wider."""
    return (largest / LARGEST[dtype]).clamp(min=_LEAST_SCALE)


def with_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x / scale`` rounded to ``dtype``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # A scale that was rounded down would push the largest value beyond the type's range.
    return (x.to(wide) / scale.to(wide)).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def dequantise(x: Quantised, block: Block, dtype: torch.dtype) -> Tensor:
    """Return values times scales in ``dtype``; ``block`` is the block of ``quantise``."""
    wide = torch.promote_types(dtype, torch.float32)
    blocks = _in_blocks(x.values.to(wide), block) * x.scales.to(wide)[..., :, None, :, None]
    return _from_blocks(blocks, x.values.shape).to(dtype)


def _in_blocks(x: Tensor, block: Block) -> Tensor:
    """Return [..., M/rows, rows, K/columns, columns], padded with zeros."""
    M, K = x.shape[-2:]
    rows, columns = block[0] or max(M, 1), block[1] or max(K, 1)
    below, beside = -M % rows, -K % columns
    if below or beside:
        x = F.pad(x, (0, beside, 0, below))
    shape = (*x.shape[:-2], (M + below) // rows, rows, (K + beside) // columns, columns)
    return x.reshape(shape)


def _from_blocks(blocks: Tensor, shape: torch.Size) -> Tensor:
    m, rows, k, columns = blocks.shape[-4:]
    whole = blocks.reshape(*shape[:-2], m * rows, k * columns)
    return whole[..., : shape[-2], : shape[-1]]


def save(x: Tensor) -> Quantised:
    """Return x [..., K] as stored for backward: E4M3 and bf16 scales, 1.125 bytes a number."""
    return quantise(x.reshape(-1, x.shape[-1]), SAVED, scale_dtype=torch.bfloat16)


def restore(values: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor that ``save`` stored as ``values`` and ``scales``, in ``dtype``."""
    return dequantise(Quantised(values, scales), SAVED, dtype).view(shape)


def gradient_type(recipe: str, gradients: str | None) -> torch.dtype:
    """Return the FP8 type of incoming gradients for ``precision.linears`` and ``.gradients``."""
    if gradients is None:
        gradients = "e5m2" if recipe == "fp8_tensorwise" else "e4m3"
    return E5M2 if gradients == "e5m2" else E4M3


def scaled_product(
    a: Quantised, b: Quantised, recipe: str, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """Return a [M, K] times b [N, K] transposed in ``dtype``, accumulated in fp32.

    ``a`` has the recipe's ``ACTIVATION_BLOCKS``, ``b`` its ``WEIGHT_BLOCKS``. ``fast``: let
    Hopper's tensor cores accumulate with fewer bits, as is usual in the forward pass.
    """
    if a.values.is_cuda:
        return _on_cuda(a, b, recipe, dtype, fast)
    return emulated_product(a, b, recipe, dtype)


def emulated_product(a: Quantised, b: Quantised, recipe: str, dtype: torch.dtype) -> Tensor:
    """Return ``scaled_product`` of the same FP8 numbers by fp32 products: the reference."""
    wide = torch.promote_types(dtype, torch.float32)
    if recipe == "fp8_blockwise":
        blocks = ACTIVATION_BLOCKS[recipe], WEIGHT_BLOCKS[recipe]
        return (dequantise(a, blocks[0], wide) @ dequantise(b, blocks[1], wide).t()).to(dtype)
    made = a.values.to(wide) @ b.values.to(wide).t()
    return (made * (a.scales.to(wide) * b.scales.to(wide).t())).to(dtype)


def _on_cuda(a: Quantised, b: Quantised, recipe: str, dtype: torch.dtype, fast: bool) -> Tensor:
    left, right = a.values, b.values
    if left.shape[1] % 16:  # in weight gradients, where K counts tokens
        beside = (0, -left.shape[1] % 16)
        left, right = (F.pad(x.view(torch.uint8), beside).view(x.dtype) for x in (left, right))
    scale_a, scale_b = a.scales, b.scales.t()
    if recipe == "fp8_rowwise":
        scale_a, scale_b = scale_a.contiguous(), scale_b.contiguous()
    elif recipe == "fp8_blockwise":
        # cuBLAS reads 1 x 128 scales column-major, and 128 x 128 scales with row strides of 4 n.
        scale_a = scale_a.t().contiguous().t()
        grid = b.scales
        scale_b = F.pad(grid, (0, -grid.shape[1] % 4))[:, : grid.shape[1]].t()
        fast = False
    return torch._scaled_mm(
        left.contiguous(),
        right.contiguous().t(),
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def grouped_on_cuda(
    x: Quantised, weights: Quantised, offsets_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return each row of x [S, K] times the transposed matrix [N, K] of its group; row scales."""
    return torch._scaled_grouped_mm(
        x.values,
        weights.values.contiguous().transpose(-2, -1),
        scale_a=x.scales.flatten(),
        scale_b=weights.scales.flatten(1),
        offs=offsets_E,
        out_dtype=dtype,
        use_fast_accum=True,
    )
