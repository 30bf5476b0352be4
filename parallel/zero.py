"""ZeRO on the ``hdp`` axis: sharding of parameters, gradients and states, and gradient reduction.

Stages as in arXiv 1910.02054, section 5. Bytes on one of W ranks for P fp32 parameters with AdamW,
and bytes that the rank sends in a step of M micro-batches (times (W-1)/W); c: bytes per element of
the type in which blocks are gathered, 2 in bf16; buffers of one block in flight are not included:

| stage | parameters           | gradients                             | states | sent       |
|-------|----------------------|---------------------------------------|--------|------------|
| 0     | 4P                   | 4P and one bucket (CPU: and 4P)       | 8P     | 8P         |
| 1     | 4P/W and cP in steps | 4P until the last backward, then 4P/W | 8P/W   | (c + 4)P   |
| 2     | 4P/W and cP in steps | 4P/W and one unsharded block          | 8P/W   | (c + 4M)P  |
| 3     | 4P/W and some blocks | 4P/W and one unsharded block          | 8P/W   | (2c + 4)MP |

Stage 2 thus saves memory at the cost of a reduction in every micro-batch, and stage 3 at the cost
of two more all-gathers: with gradient accumulation prefer the lowest stage that fits (``regather:
step`` makes stage 3 gather as often as stage 2). In a pipeline, gradients are reduced once, in the
last backward of a stage, at every stage of ZeRO, and parameters are gathered once, unless
``regather: micro_batch``.

The parameters of a block are gathered while the two blocks before it compute, in forward and
backward (``prefetch``). The gradients of a block are reduced while earlier blocks run their last
backward. ``replicas`` > 1 is hybrid sharding: W is then the number of ranks of a replica, and
gradients are also summed over replicas. ``offload: cpu`` keeps shards and optimizer on the host.
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
    """Stages 1 to 3 with FSDP2: one group for the embedding, each block, and the rest.

    Stage 1 gathers parameters once per step, keeps unsharded fp32 gradients and reduce-scatters
    them in the last backward. Stage 2 reduce-scatters in every backward and accumulates shards.
    Stage 3 also frees a block's parameters after its forward and its backward.

    Parameters become DTensors, sharded in the dimension given by ``scaling.shards.zero_dim``: the
    first, or another one if there are too few experts. Between steps parameters are always sharded.
    For example, ``regather: step`` makes stage 3 keep a block's parameters until the end of the
    step.
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
        # A pipeline reduces once, after a stage's last backward.
        self._every_time = zero.stage >= 2 and mesh.pp.size == 1
        self._free_after_backward = zero.frees(mesh.pp.size) and mesh.pp.size == 1
        self._held = False  # True: parameters stay gathered after a forward without gradients
        for part in parts:
            shard_model(part, mesh, zero, compute_dtype)
            prefetch(part)
            part.register_forward_hook(self._after_forward)
        self._fp8 = Fp8Gather(parts, mesh.hdp, compute_dtype) if gather_fp8 else None
        for part in parts if gather_fp8 else ():
            part.register_forward_pre_hook(self._refresh, prepend=True)  # before FSDP2's own hook
        self._parts, self._tp = parts, mesh.tp
        self._roots: list[FSDPModule] = [part for part in parts if isinstance(part, FSDPModule)]
        self._units = [m for part in parts for m in part.modules() if isinstance(m, FSDPModule)]
        for unit in self._units:
            # FSDP2 averages by default. All backends support a plain SUM, but not a SUM with a
            # factor of 1.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # Ranks must reduce the same tensors even if one rank lacks a gradient. torch 2.11 has
            # no such option and aborts, but our models always have all gradients.
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
        """Return at once: FSDP2 has started all reductions in the backward."""

    @override
    def begin_uneven(self) -> bool:
        # Gather all units at once: a rank that gathers unit by unit inside a ring would block
        # others.
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
            self._fp8.stale = True  # the optimizer step follows

    def _end_without_backward(self, part: Transformer) -> None:
        """Free the parameters that a part has gathered in this step, as a backward would."""
        self.close(part)
        state: Any = part._get_fsdp_state()  # type: ignore[operator]
        state._root_post_backward_final_callback()

    def _refresh(self, *_: Any) -> None:
        if self._fp8 is not None:
            self._fp8.refresh()

    def _after_forward(self, *_: Any) -> None:
        """Reshard after a forward without a backward, since the backward would have resharded.

        Otherwise the next step would compute with the parameters gathered for evaluation, and
        listing the parameters in between would return unsharded copies that are not trained.
        """
        if not (self._held or torch.is_grad_enabled()):
            for unit in self._units:
                unit.reshard()


def shard_model(model: Transformer, mesh: Mesh, zero: Zero, compute_dtype: torch.dtype) -> None:
    """Apply ``fully_shard`` to embedding, experts, routers, blocks and the model, inside out.

    In bf16, blocks and head are gathered in bf16, the type to which the modules would cast. The
    embedding is gathered in its own type because its gradient is accumulated over the tokens of a
    batch: in bf16 a frequent token would lose most of its gradient. Routers are gathered in their
    own type because they compute in fp32. Inputs are never cast. Experts that are sharded over ep
    ranks are sharded over the ranks with the same experts.
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
    spread: dict[str, Any] = {}  # options of experts sharded over ep ranks
    if mesh.ep.size > 1:
        shards = mesh.hdp.size // zero.replicas // mesh.ep.size
        spread = {"mesh": mesh.expert_zero_mesh, "shard_placement_fn": _placement(shards)}
    reshard = zero.frees(mesh.pp.size)
    # The head needs a tied embedding again; the backward of an embedding needs no table.
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
        # Backward starts with the last block, which would be gathered again immediately.
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
    _shard_copies(model, zero.frees(mesh.pp.size), mp_policy=plain, **common)
    if model.aggregator is not None and low is not None:  # computes in fp32, as routers do
        fully_shard(model.aggregator.choice, mp_policy=plain, **common)
    # Backward starts with norm and head, which would be gathered again if freed after forward.
    fully_shard(model, mp_policy=mixed, reshard_after_forward=False, **common)


def _shard_copies(model: Transformer, frees: bool, **options: Any) -> None:
    """Shard copies of an embedding, which are gathered and reduced like the embedding."""
    if model.mirrored and model.head is not None:
        fully_shard(model.head, reshard_after_forward=False, **options)
    if model.mtp is not None and "embedding" in model.mtp:
        table = model.mtp["embedding"]
        fully_shard(table, reshard_after_forward=frees, **options)
        table.set_unshard_in_backward(False)


def prefetch(model: Transformer) -> None:
    """Make each block prefetch the parameters of the next ``PREFETCHED`` blocks when it starts.

    Prefetching applies to forward and backward, and includes experts and routers with their own
    groups. On a device with communication streams the all-gathers then overlap with computation. By
    default FSDP2 issues an all-gather when the block that needs it starts, and one block ahead in
    backward. On a CPU the same messages are sent in another order. Gathered parameters are not
    gathered again.
    """
    assert isinstance(model, FSDPModule)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            # By default FSDP2 prefetches in backward the unit that ran before in forward: after the
            # first block of a micro-batch this is the last block of the previous micro-batch, which
            # is unnecessary.
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
    # Blocks without a backward would stay gathered until the next step.
    returning = [[] if place < dormant else units for place, units in enumerate(blocks)]
    # Blocks of multi-token prediction do not run in an evaluation, which would leave them gathered.
    main = len(model.part.layers)
    forward, backward = [*blocks[:main], *end], [*end, *reversed(returning)]

    def ahead(units: list[list[FSDPModule]], place: int) -> list[FSDPModule]:
        return [unit for some in units[place : place + PREFETCHED] for unit in some]

    # The root starts first; it computes nothing before the embedding.
    model.set_modules_to_forward_prefetch([*start, *ahead(forward, 0)])
    model.set_modules_to_backward_prefetch(ahead(backward, 0))
    for place, (block, *_) in enumerate(blocks):
        if place < main:
            block.set_modules_to_forward_prefetch(ahead(forward, place + 1))
        if place > 0:
            block.set_modules_to_backward_prefetch(ahead(backward, len(backward) - place))


def without_backward(model: Transformer) -> int:
    """Return the number of leading blocks of a part that have no backward.

    These blocks and the embedding before them are frozen. Inputs from another stage require
    gradients.
    """
    if model.embedding is None or any(p.requires_grad for p in model.embedding.parameters()):
        return 0
    trained = (any(p.requires_grad for p in block.parameters()) for block in model.blocks.values())
    return next((place for place, some in enumerate(trained) if some), len(model.blocks))


def differentiated(part: Transformer) -> bool:
    """Return True if a step has a backward through a part; False for frozen first stages."""
    trained = any(parameter.requires_grad for parameter in part.parameters())
    return trained or part.embedding is None


def reduction_groups(parts: Sequence[Transformer], mesh: Mesh) -> list[ReductionGroup]:
    """Return all parameters by the axis of ranks that have the same ones: hdp; edp for experts."""
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
    """Shard over the hdp axis according to ``zero.stage``; ``gather_fp8``: see ``gather_fp8.py``.

    Returns the gradient synchronization. For example, ``zero.stage: 0`` returns a ``FlatReducer``.
    """
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
    """Return FSDP2's function that selects the dimension to shard over ``ranks`` ranks."""

    def choose(parameter: nn.Parameter) -> Shard:
        part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(zero_dim(tuple(part.shape), ranks))

    return choose


def _special(block: nn.Module) -> Iterator[tuple[nn.Module, Role]]:
    """Yield the modules of a block that own weights of routers and experts."""
    for module in block.modules():
        if isinstance(module, OwnsParameters):
            roles = {spec.role for spec in module.specs.values()}
            for role in (Role.ROUTER, Role.EXPERT_UP):
                if role in roles:
                    yield module, role
