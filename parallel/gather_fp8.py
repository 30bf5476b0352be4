"""FSDP2's gathers in FP8: each rank rounds its shard, and a byte of a number travels.

A scale must be of the whole stack of weights that one product reads, as it is where the whole is
rounded: the largest magnitudes of all shards are one small all-reduce, the first time that
parameters are gathered after a step. With it the numbers are those that ``models/fp8.py`` would
make of the gathered weights, to the bit. FSDP2 asks a shard for ``fsdp_pre_all_gather`` and
``fsdp_post_all_gather``; torchao's ``enable_fsdp_float8_all_gather`` answers with the same
numbers, but belongs to linear layers of torchao's own.
"""

# R output width of a weight, r rows of it in a shard, D input width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from allometry.models import fp8
from allometry.models.gathered import Gathered
from allometry.models.products import Stacked, stacks
from allometry.parallel.mesh import Axis
from allometry.scaling.roles import MATRICES


class Fp8Gather:
    """The weights of ``parts`` whose products are FP8 under one scale, gathered in FP8 over hdp."""

    def __init__(self, parts: Sequence[nn.Module], axis: Axis, compute_dtype: torch.dtype) -> None:
        self._axis, self._dtype = axis, compute_dtype
        self._stacks: list[Stacked] = [
            stacked
            for part in parts
            for stacked in stacks(part)
            if stacked.recipe == "fp8_tensorwise" and stacked.role in MATRICES
        ]
        self._scales: Tensor | None = None
        self.stale = True
        """Whether parameters have changed since scales were found. All ranks must say so alike."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Find scales anew if parameters have changed, while they are shards."""
        if not self.stale or not self._stacks:
            return
        self.stale = False
        shards = [[_shard(owner, name) for owner, name in each.places] for each in self._stacks]
        largest = torch.stack(
            [torch.stack([shard.abs().amax() for shard in each]).amax() for each in shards]
        )
        # As the products round to the compute type first; what is largest stays so. A NaN may be
        # lost in a maximum over ranks, an infinity is not: either makes the whole weight NaN.
        largest = largest.to(self._dtype).nan_to_num(nan=float("inf"), posinf=float("inf"))
        largest = largest.to(torch.promote_types(self._dtype, torch.float32))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._axis.group)
        scales = fp8.scales_of(largest, fp8.E4M3)
        if self._scales is None:
            self._scales = torch.empty_like(scales)
        self._scales.copy_(scales)  # where gathered weights look for them
        for each, scale in zip(shards, self._scales.unbind(), strict=True):
            for shard in each:
                if not hasattr(shard, "fsdp_pre_all_gather"):
                    hooks = _Hooks(shard, scale, self._dtype)
                    shard.fsdp_pre_all_gather = hooks.before  # type: ignore[attr-defined]
                    shard.fsdp_post_all_gather = hooks.after  # type: ignore[attr-defined]


def _shard(owner: nn.Module, name: str) -> Tensor:
    parameter = getattr(owner, name)
    assert isinstance(parameter, DTensor), "scales are found while parameters are shards"
    return parameter._local_tensor  # itself, which FSDP2 asks; ``to_local`` makes another object


class _Hooks:
    """What FSDP2 calls around the gather of one weight."""

    def __init__(self, shard: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self._values = shard.detach()  # the same memory, without these hooks
        self._scale, self._dtype = scale, dtype

    def before(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """Return what of this rank's shard [r, D] travels: bytes."""
        rounded = fp8.with_scale(self._values.to(self._dtype), self._scale, fp8.E4M3)
        return (rounded.view(torch.uint8),), None

    def after(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the weight [R, D]; ``out`` is one that lies in this memory already."""
        if out is not None:
            return None
        (values,) = gathered
        return Gathered(values.view(fp8.E4M3), self._scale, self._dtype), ()
