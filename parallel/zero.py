"""ZeRO on the ``hdp`` axis: what is replicated, what is sharded, when gradients are reduced.

Stages as in arXiv 1910.02054, section 5. Bytes on one of W ranks for P fp32 parameters with AdamW,
and bytes it sends in a step of M micro-batches (times (W-1)/W); c: bytes of the type that blocks
are gathered in, 2 in bf16; the buffers of one block in flight left out:

| stage | parameters           | gradients                             | states | sent       |
|-------|----------------------|---------------------------------------|--------|------------|
| 0     | 4P                   | 4P and one bucket (CPU: and 4P)       | 8P     | 8P         |
| 1     | 4P/W and cP in steps | 4P until the last backward, then 4P/W | 8P/W   | (c + 4)P   |
| 2     | 4P/W and cP in steps | 4P/W and one block whole              | 8P/W   | (c + 4M)P  |
| 3     | 4P/W and some blocks | 4P/W and one block whole              | 8P/W   | (2c + 4)MP |

So stage 2 pays for its memory with a reduction in every micro-batch, and stage 3 with two gathers
as well: with gradient accumulation prefer the lowest stage that fits (``regather: step`` makes
stage 3 gather as stage 2 does). In a pipeline gradients are reduced once, in a stage's last
backward, at every stage of ZeRO, and parameters gathered once, unless ``regather: micro_batch``.

What a block computes with is gathered while the two before it compute, in forward and in backward
(``prefetch``). A block's gradients are reduced while the blocks before it do their last backward.

``replicas`` > 1 is hybrid sharding: W is then a copy's share of the ranks, and gradients are summed
over the copies too. ``offload: cpu`` keeps the shards and the optimizer on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from allometry.configs.execution import Zero
from allometry.models.build import named_parameters
from allometry.models.parameters import OwnsParameters
from allometry.models.transformer import Transformer
from allometry.parallel.gather_fp8 import Fp8Gather
from allometry.parallel.mesh import Mesh
from allometry.parallel.reduce import FlatReducer, GradientSync, ReductionGroup, sum_over_tp
from allometry.scaling.roles import Role
from allometry.scaling.shards import PREFETCHED, zero_dim


class FullyShardedSync(GradientSync):
    """Stages 1 to 3 with FSDP2: a group for the embedding, one for each block, one for the rest.

    Stage 1 gathers parameters once a step, keeps gradients whole (in fp32) and reduce-scatters
    them in the last backward. Stage 2 reduce-scatters in every backward and adds up shards.
    Stage 3 also frees a block's parameters after its forward and its backward.

    Parameters become DTensors, sharded in the dimension that ``scaling.shards.zero_dim`` says: the
    first, or of too few experts another. Between steps they are always shards.
    """

    def __init__(
        self,
        parts: Sequence[Transformer],
        mesh: Mesh,
        zero: Zero,
        compute_dtype: torch.dtype,
        gather_fp8: bool = False,
    ) -> None:
        assert zero.stage in (1, 2, 3), zero.stage
        # A pipeline's schedule reduces once, after a stage's last backward.
        self._every_time = zero.stage >= 2 and mesh.pp.size == 1
        self._free_after_backward = zero.frees(mesh.pp.size) and mesh.pp.size == 1
        self._held = False  # whether parameters stay gathered after a forward without gradients
        for part in parts:
            shard_model(part, mesh, zero, compute_dtype)
            prefetch(part)
            part.register_forward_hook(self._after_forward)
        self._fp8 = Fp8Gather(parts, mesh.hdp, compute_dtype) if gather_fp8 else None
        for part in parts if gather_fp8 else ():
            part.register_forward_pre_hook(self._refresh, prepend=True)  # before FSDP2's own
        self._parts, self._tp = parts, mesh.tp
        self._roots: list[FSDPModule] = [part for part in parts if isinstance(part, FSDPModule)]
        self._units = [m for part in parts for m in part.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            # FSDP2 averages unless told otherwise. A plain SUM, rather than a SUM that multiplies
            # by 1, is what every backend has.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # Ranks must reduce the same tensors also where one of them lacks a gradient. torch
            # 2.11 has no such switch and aborts there; our models never come to it.
            if hasattr(unit, "set_reduce_scatter_unused_params"):
                unit.set_reduce_scatter_unused_params(True, recurse=False)

    @override
    def micro_batch(self, last: bool) -> None:
        for root in self._roots:
            root.set_is_last_backward(last)
            root.set_requires_gradient_sync(last or self._every_time)
            root.set_reshard_after_backward(last or self._free_after_backward)

    @override
    def close(self, part: nn.Module) -> None:
        assert isinstance(part, FSDPModule)
        part.set_is_last_backward(True)
        part.set_requires_gradient_sync(True)
        part.set_reshard_after_backward(True)

    @override
    def closed(self, part: nn.Module) -> None:
        """Nothing: FSDP2 has started every reduction in the backward itself."""

    @override
    def begin_uneven(self) -> bool:
        # Gathered one by one, a rank in a ring would keep others waiting.
        for root in self._roots:
            root.set_is_last_backward(False)
            root.set_requires_gradient_sync(False)
            root.set_reshard_after_backward(False)
        self._refresh()
        for unit in self._units:
            unit.unshard()
        return True

    @override
    @contextmanager
    def gathered(self) -> Iterator[None]:
        self._held = True
        self._refresh()
        for unit in self._units:
            unit.unshard()
        try:
            yield
        finally:
            self._held = False
            for unit in self._units:
                unit.reshard()

    @override
    def finish(self) -> None:
        # FSDP2 has summed over hdp in the last backward.
        for part in self._parts:
            if not differentiated(part):
                self._end_without_backward(part)
        sum_over_tp((p for part in self._parts for p in part.parameters()), self._tp)
        if self._fp8 is not None:
            self._fp8.stale = True  # the optimizer is next

    def _end_without_backward(self, part: Transformer) -> None:
        """Free what a part has gathered in this step, as the end of a backward would have done."""
        self.close(part)
        state: Any = part._get_fsdp_state()  # type: ignore[operator]
        state._root_post_backward_final_callback()

    def _refresh(self, *_: Any) -> None:
        if self._fp8 is not None:
            self._fp8.refresh()

    def _after_forward(self, *_: Any) -> None:
        """Return to shards after a forward without a backward, which would have done it.

        Otherwise the next step would compute with the parameters that evaluation gathered, and
        whoever lists parameters in between would find whole copies that nobody trains.
        """
        if not (self._held or torch.is_grad_enabled()):
            for unit in self._units:
                unit.reshard()


def shard_model(model: Transformer, mesh: Mesh, zero: Zero, compute_dtype: torch.dtype) -> None:
    """Apply ``fully_shard`` to embedding, experts, routers, blocks and the whole, inside out.

    In bf16, blocks and head are gathered in bf16: the modules would cast to it anyway. The
    embedding is gathered as it is, because its gradient adds up over the tokens of a batch: in
    bf16 a frequent token would lose most of them; routers are, because they compute in fp32.
    Inputs are never cast. Experts that are spread over ep ranks are sharded over the ranks that
    hold the same ones.
    """
    low = compute_dtype if compute_dtype.itemsize < 4 else None
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(
        param_dtype=low,
        reduce_dtype=None if low is None else torch.float32,
        cast_forward_inputs=False,
    )
    on_cuda = mesh.device.type == "cuda"
    common: dict[str, Any] = {
        "mesh": mesh.zero_mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=on_cuda)
        if zero.offload == "cpu"
        else OffloadPolicy(),
        "shard_placement_fn": _placement(mesh.hdp.size // zero.replicas),
    }
    spread: dict[str, Any] = {}  # what differs for experts that are spread over ep ranks
    if mesh.ep.size > 1:
        shards = mesh.hdp.size // zero.replicas // mesh.ep.size
        spread = {"mesh": mesh.expert_zero_mesh, "shard_placement_fn": _placement(shards)}
    reshard = zero.frees(mesh.pp.size)
    # A tied embedding is needed again by the head; the backward of a look-up needs no table.
    if model.embedding is not None:
        fully_shard(
            model.embedding,
            mp_policy=plain,
            reshard_after_forward=reshard and not model.tied,
            **common,
        )
        if not model.tied:
            model.embedding.set_unshard_in_backward(False)
    *_, last = model.blocks.values()
    for block in model.blocks.values():
        # Backward begins with the last block: it would be gathered again before anything computes.
        reshard = zero.frees(mesh.pp.size) and block is not last
        for module, role in _special(block):
            apart = role is not Role.ROUTER and mesh.ep.size > 1
            if apart or (role is Role.ROUTER and low is not None):
                fully_shard(
                    module,
                    mp_policy=plain if role is Role.ROUTER else mixed,
                    reshard_after_forward=reshard,
                    **common | (spread if apart else {}),
                )
        fully_shard(block, mp_policy=mixed, reshard_after_forward=reshard, **common)
    if model.mirrored and model.head is not None:
        # A copy of an embedding is gathered and reduced as the embedding is.
        fully_shard(model.head, mp_policy=plain, reshard_after_forward=False, **common)
    # Backward begins with norm and head: freeing them after forward would only gather them again.
    fully_shard(model, mp_policy=mixed, reshard_after_forward=False, **common)


def prefetch(model: Transformer) -> None:
    """Let each block, when it begins, have the next ``PREFETCHED`` blocks' parameters gathered.

    In forward and in backward, with the experts and routers that are gathered by themselves. On a
    device with streams of its own for communication the gathers then run behind what the block
    computes; left to itself FSDP2 would issue a gather when the block that needs it begins, and in
    backward one block ahead. On a CPU the same messages come in another order. What is gathered
    already is not gathered again.
    """
    assert isinstance(model, FSDPModule)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # Left to itself, FSDP2 gathers in backward what was forward before: after the first
            # block of a micro-batch the last one of the micro-batch before, for nothing.
            unit.set_modules_to_backward_prefetch([unit])
    blocks = [
        [m for m in block.modules() if isinstance(m, FSDPModule)] for block in model.blocks.values()
    ]
    dormant = without_backward(model)
    start: list[FSDPModule] = []
    if isinstance(model.embedding, FSDPModule):
        start = [model.embedding]
    end: list[list[FSDPModule]] = []
    if isinstance(model.head, FSDPModule):
        end = [[model.head]]
    # What has no backward would stay gathered until the next step.
    returning = [[] if place < dormant else units for place, units in enumerate(blocks)]
    forward, backward = [*blocks, *end], [*end, *reversed(returning)]

    def ahead(units: list[list[FSDPModule]], place: int) -> list[FSDPModule]:
        return [unit for some in units[place : place + PREFETCHED] for unit in some]

    # The root begins first; it has nothing to compute before the embedding.
    model.set_modules_to_forward_prefetch([*start, *ahead(forward, 0)])
    model.set_modules_to_backward_prefetch(ahead(backward, 0))
    for place, (block, *_) in enumerate(blocks):
        block.set_modules_to_forward_prefetch(ahead(forward, place + 1))
        if place > 0:
            block.set_modules_to_backward_prefetch(ahead(backward, len(backward) - place))


def without_backward(model: Transformer) -> int:
    """Return how many blocks of a part, from its first, nothing differentiates.

    They and the embedding before them are frozen. What comes from another stage has a gradient.
    """
    if model.embedding is None or any(p.requires_grad for p in model.embedding.parameters()):
        return 0
    trained = (any(p.requires_grad for p in block.parameters()) for block in model.blocks.values())
    return next((place for place, some in enumerate(trained) if some), len(model.blocks))


def differentiated(part: Transformer) -> bool:
    """Return whether a step has a backward through a part: not through frozen first stages."""
    trained = any(parameter.requires_grad for parameter in part.parameters())
    return trained or part.embedding is None


def reduction_groups(parts: Sequence[Transformer], mesh: Mesh) -> list[ReductionGroup]:
    """Return all parameters by who holds the same ones: hdp, or edp for spread experts."""
    common: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for part in parts:
        for _, owner, name, parameter in named_parameters(part):
            assert isinstance(owner, OwnsParameters)
            role = owner.specs[name].role
            spread = mesh.ep.size > 1 and role in (Role.EXPERT_UP, Role.EXPERT_DOWN)
            (experts if spread else common).append(parameter)
    return [(common, mesh.hdp), *([(experts, mesh.edp)] if experts else [])]


def apply_zero(
    parts: Sequence[Transformer],
    zero: Zero,
    compute_dtype: torch.dtype,
    mesh: Mesh,
    gather_fp8: bool = False,
) -> GradientSync:
    """Shard over the hdp axis what ``zero.stage`` says; ``gather_fp8``: see ``gather_fp8.py``."""
    if zero.stage == 0:
        return FlatReducer(
            lambda: reduction_groups(parts, mesh),
            mesh.tp,
            zero.bucket_mib * 2**20,
            overlap=mesh.device.type == "cuda",
            keep=mesh.device.type == "cpu",
        )
    return FullyShardedSync(parts, mesh, zero, compute_dtype, gather_fp8)


def _placement(ranks: int) -> Callable[[nn.Parameter], Shard]:
    """Return what tells FSDP2 which dimension of a parameter to shard over so many ranks."""

    def choose(parameter: nn.Parameter) -> Shard:
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(zero_dim(tuple(part.shape), ranks))

    return choose


def _special(block: nn.Module) -> Iterator[tuple[nn.Module, Role]]:
    """Yield the modules of a block that own routers' and experts' weights."""
    for module in block.modules():
        if isinstance(module, OwnsParameters):
            roles = {spec.role for spec in module.specs.values()}
            for role in (Role.ROUTER, Role.EXPERT_UP):
                if role in roles:
                    yield module, role
