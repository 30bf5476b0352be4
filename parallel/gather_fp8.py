"""FSDP2 all-gathers in FP8: each rank rounds its shard and sends one byte per element.

A scale must cover the full stack of weights that one product reads, as if the unsharded weights
were rounded. The largest magnitudes of all shards are therefore combined in one small all-reduce,
at the first all-gather after an optimizer step. The gathered numbers then equal the numbers that
``models/fp8.py`` computes from the gathered weights, bit for bit. FSDP2 calls
``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of a shard. torchao's
``enable_fsdp_float8_all_gather`` computes the same numbers, but supports only the linear layers of
torchao.
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
    """FP8 all-gather over hdp of the weights of ``parts`` whose products are FP8 with one scale."""

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
        """True if parameters have changed since the last scales; must be equal on all ranks."""

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute the scales if parameters have changed; parameters must be sharded."""
        if not self.stale or not self._stacks:
            return
        self.stale = False
        shards = [[_shard(owner, name) for owner, name in each.places] for each in self._stacks]
        largest = torch.stack(
            [torch.stack([shard.abs().amax() for shard in each]).amax() for each in shards]
        )
        # Products round to the compute type first; rounding is monotonic, so the largest magnitude
        # stays the largest. A maximum over ranks may lose a NaN but keeps an infinity, and either
        # makes the full weight NaN.
        largest = largest.to(self._dtype).nan_to_num(nan=float("inf"), posinf=float("inf"))
        largest = largest.to(torch.promote_types(self._dtype, torch.float32))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._axis.group)
        scales = fp8.scales_of(largest, fp8.E4M3)
        if self._scales is None:
            self._scales = torch.empty_like(scales)
        self._scales.copy_(scales)  # in place: gathered weights refer to this tensor
        for each, scale in zip(shards, self._scales.unbind(), strict=True):
            for shard in each:
                if not hasattr(shard, "fsdp_pre_all_gather"):
                    hooks = _Hooks(shard, scale, self._dtype)
                    shard.fsdp_pre_all_gather = hooks.before  # type: ignore[attr-defined]
                    shard.fsdp_post_all_gather = hooks.after  # type: ignore[attr-defined]


def _shard(owner: nn.Module, name: str) -> Tensor:
    parameter = getattr(owner, name)
    assert isinstance(parameter, DTensor), "scales are found while parameters are shards"
    return parameter._local_tensor  # the object that FSDP2 inspects; ``to_local`` returns a new one


class _Hooks:
    """FSDP2's hooks around the all-gather of one weight."""

    def __init__(self, shard: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self._values = shard.detach()  # the same memory, without these hooks
        self._scale, self._dtype = scale, dtype

    def before(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """Return this rank's shard [r, D] as bytes to send."""
        rounded = fp8.with_scale(self._values.to(self._dtype), self._scale, fp8.E4M3)
        return (rounded.view(torch.uint8),), None

    def after(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Any = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the weight [R, D]; None if ``out`` already views the gathered memory."""
        if out is not None:
            return None
        (values,) = gathered
        return Gathered(values.view(fp8.E4M3), self._scale, self._dtype), ()
