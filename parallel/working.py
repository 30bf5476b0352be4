"""Copies of parameters in the compute type, which FSDP2 gathers in place of the parameters.

FSDP2 keeps shards in fp32 and casts them to bf16 at every all-gather. A shard that is cast once,
after the update, gives the same bits, and the fp32 values may be elsewhere in the meantime. The
copy has FSDP2's format of a shard (flat, padded) and is stored in the one private attribute that
all-gathers read. Gradients are still fp32, since the parameter remains an fp32 parameter of its
shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Mesh, local
from allometry.parallel.reduce import is_replicated_over_tp


class WorkingCopy:
    """This rank's shard of one parameter in the compute type.

    FSDP2 gathers the parameter itself until ``hold``, and afterwards only the copy.
    """

    def __init__(self, shard: Any) -> None:
        self._shard, self._flat, self.held = shard, torch.empty(0), False

    @property
    def parameter(self) -> Tensor:
        """The parameter, a DTensor in fp32."""
        made: Tensor = self._shard.sharded_param
        return made

    @torch.no_grad()
    def hold(self) -> None:
        """Create the copy from the current values, on the device of the parameter's shard."""
        data = self._shard._sharded_param_data
        made = data.to(self._shard.param_dtype)
        if data.device.type == "cpu" and data.is_pinned():
            made = made.pin_memory()
        self._shard._sharded_param_data = self._flat = made
        self.held = True

    @property
    def part(self) -> Tensor:
        """Writable view of this rank's part, without padding."""
        shape = local(self.parameter.detach()).shape
        return self._flat[: math.prod(shape)].view(shape)

    def leave(self) -> None:
        """Release the memory of the parameter, which becomes an expanded scalar NaN."""
        self.show(torch.full((), math.nan, dtype=self.parameter.dtype, device=self._flat.device))

    def show(self, part: Tensor) -> None:
        """Use ``part`` as memory of the parameter; a 0-dim ``part`` is expanded."""
        parameter = self.parameter
        assert isinstance(parameter, DTensor)
        held = parameter._local_tensor
        held.data = part.expand(held.shape) if part.dim() == 0 else part


def working_copies(parts: Iterable[nn.Module]) -> dict[Tensor, WorkingCopy]:
    """Return a working copy for each parameter that FSDP2 gathers in a type smaller than its own.

    The parts must be sharded and initialized.
    """
    copies = [WorkingCopy(shard) for part in parts for shard in _shards(part)]
    return {copy.parameter: copy for copy in copies}


def reduced_alone(parts: Iterable[Transformer], mesh: Mesh, *, tied: bool) -> list[Tensor]:
    """Return the parameters of sharded models whose gradients only FSDP2 reduces.

    Excluded are parameters that are also summed over tp, and a ``tied`` embedding that receives the
    gradient of a head in another stage.
    """
    made: list[Tensor] = []
    for part in parts:
        for module in part.modules():
            parted = tied and mesh.pp.size > 1 and module is part.embedding
            own = () if parted else module.parameters(recurse=False)
            made += [p for p in own if mesh.tp.size == 1 or not is_replicated_over_tp(p)]
    return made


def _shards(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has a single group
        for group in [state._fsdp_param_group] if groups is None else groups:
            if group is not None:
                group.lazy_init()  # afterwards FSDP2 does not access a parameter's memory again
                yield from (
                    shard
                    for shard in group.fsdp_params
                    if shard.param_dtype is not None
                    and shard.param_dtype.itemsize < shard.orig_dtype.itemsize
                )
