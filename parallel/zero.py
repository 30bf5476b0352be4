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
as well: with gradient accumulation prefer the lowest stage that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from allometry.models.transformer import Transformer
from allometry.parallel.mesh import Axis


class GradientSync(Protocol):
    """Sums gradients over the hdp ranks, once a step.

    The loop of a step, on every rank with the same number of micro-batches::

        optimizer.zero_grad(set_to_none=True)
        for i in range(n):
            sync.micro_batch(last=i == n - 1)
            (model(...).total / global_count).backward()
        sync.finish()

    After ``finish`` each parameter's ``.grad`` is the SUM over ranks and micro-batches (nothing is
    averaged: the loss was divided by the global count), reduced in fp32 (fp64 where parameters
    are). Forward passes under ``no_grad`` may run before or after a step, not within one.
    """

    def micro_batch(self, last: bool) -> None:
        """Announce the next forward and backward; ``last``: the step's last one."""

    def finish(self) -> None:
        """Complete the reduction after the last backward."""


class FlatReducer:
    """Stage 0: whole gradients, summed over ``line`` in a few flat buckets of fp32.

    Alone on its line it does nothing at all: gradients stay as autograd made them. Otherwise they
    are copied into buckets, and ``.grad`` becomes a view of its bucket, so nothing is copied back.
    The next ``zero_grad(set_to_none=True)`` drops the views; autograd then hands over fresh
    gradients as if we did not exist, without a zero-fill or an addition in the first micro-batch.

    ``overlap``: copy and reduce a bucket during the last backward, once its last gradient is
    there, and give its memory back with the views. That is right for CUDA, where communication
    has its own hardware and memory is short. Without it all are reduced in ``finish``, and their
    memory is kept: a CPU pays more for fresh pages than for the copy.

    A parameter that has no gradient on some rank counts as zero there. Parameters are looked up
    at the first micro-batch, so they may still move between devices before.
    """

    def __init__(self, module: nn.Module, line: Axis, bucket_bytes: int, overlap: bool) -> None:
        self._module = module
        self._line = line
        self._bucket_bytes = bucket_bytes
        self._overlap = overlap
        self._buckets: list[_Bucket] | None = None
        self._launched = 0
        self._last = False

    def micro_batch(self, last: bool) -> None:
        """See ``GradientSync``."""
        if self._buckets is None:
            self._buckets = list(self._make_buckets())
        self._last = last
        for bucket in self._buckets:
            bucket.awaited = len(bucket.parameters)

    def finish(self) -> None:
        """See ``GradientSync``."""
        assert self._last, "finish() comes after the backward of micro_batch(last=True)"
        assert self._buckets is not None
        self._last = False
        while self._launched < len(self._buckets):
            self._launch_next()
        for bucket in self._buckets:
            bucket.wait()
        self._launched = 0

    def _make_buckets(self) -> Iterator[_Bucket]:
        if self._line.size == 1:
            return
        # Last parameter first: the order in which backward completes gradients.
        waiting: list[nn.Parameter] = []
        bytes_waiting = 0
        for parameter in reversed([p for p in self._module.parameters() if p.requires_grad]):
            wide = _wide(parameter.dtype)
            size = parameter.numel() * wide.itemsize
            other = waiting and _wide(waiting[0].dtype) != wide
            if waiting and (other or bytes_waiting + size > self._bucket_bytes):
                yield self._make_bucket(waiting)
                waiting, bytes_waiting = [], 0
            waiting.append(parameter)
            bytes_waiting += size
        yield self._make_bucket(waiting)

    def _make_bucket(self, parameters: list[nn.Parameter]) -> _Bucket:
        bucket = _Bucket(parameters, self._line.group, keep=not self._overlap)
        if self._overlap:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, bucket=bucket: self._ready(bucket)
                )
        return bucket

    def _ready(self, bucket: _Bucket) -> None:
        """One more gradient of ``bucket`` is complete for this micro-batch."""
        bucket.awaited -= 1
        if not self._last:
            return
        assert self._buckets is not None
        # Strictly in order, also when a later bucket is complete first: all ranks must issue the
        # same collectives in the same order, whichever gradients they lack.
        while self._launched < len(self._buckets) and self._buckets[self._launched].awaited == 0:
            self._launch_next()

    def _launch_next(self) -> None:
        assert self._buckets is not None
        self._buckets[self._launched].launch()
        self._launched += 1


class _Bucket:
    """Parameters that are reduced together, and the flat buffer for it.

    ``keep``: hold the buffer from step to step instead of asking for it at each launch.
    """

    def __init__(
        self, parameters: list[nn.Parameter], group: dist.ProcessGroup, keep: bool
    ) -> None:
        self.parameters = parameters
        self.awaited = len(parameters)
        self._group = group
        self._keep = keep
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    @torch.no_grad()
    def launch(self) -> None:
        """Copy the gradients in and start to sum them."""
        sizes = [p.numel() for p in self.parameters]
        if self._flat is None:
            first = self.parameters[0]
            self._flat = torch.empty(sum(sizes), dtype=_wide(first.dtype), device=first.device)
        views, gradients = [], []
        for parameter, part in zip(self.parameters, self._flat.split(sizes), strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                views.append(part.view(parameter.shape))
                gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)
        del views, gradients
        # The originals go now, not at the end: their memory serves the rest of the backward.
        for parameter, part in zip(self.parameters, self._flat.split(sizes), strict=True):
            if parameter.dtype == part.dtype:
                parameter.grad = part.view(parameter.shape)
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """Let the sums arrive (on CUDA: order the current stream after them)."""
        assert self._work is not None
        assert self._flat is not None
        self._work.wait()
        self._work = None
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, self._flat.split(sizes), strict=True):
            if parameter.dtype != part.dtype:  # autograd insists on the parameter's type
                parameter.grad = part.view(parameter.shape).to(parameter.dtype)
        if not self._keep:
            self._flat = None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class FullyShardedSync:
    """Stages 1 to 3 with FSDP2: a group for the embedding, one for each block, one for the rest.

    Stage 1 gathers parameters once a step, keeps gradients whole (in fp32) and reduce-scatters
    them in the last backward. Stage 2 reduce-scatters in every backward and adds up shards.
    Stage 3 also frees a block's parameters after its forward and its backward.

    Parameters become DTensors, ``Shard(0)`` over ``mesh``; between steps they are always shards.
    """

    def __init__(
        self, model: Transformer, mesh: DeviceMesh, stage: int, compute_dtype: torch.dtype
    ) -> None:
        assert stage in (1, 2, 3), stage
        self._stage = stage
        self._last = False
        shard_model(model, mesh, compute_dtype, reshard_after_forward=stage == 3)
        self._units = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self._root = self._units[0]
        for unit in self._units:
            # FSDP2 averages unless told otherwise. A plain SUM, rather than a SUM that multiplies
            # by 1, is what every backend has.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            # Ranks must reduce the same tensors also where one of them lacks a gradient. torch
            # 2.11 has no such switch and aborts there; a dense model never comes to it.
            if hasattr(unit, "set_reduce_scatter_unused_params"):
                unit.set_reduce_scatter_unused_params(True, recurse=False)
        model.register_forward_hook(self._after_forward)

    def micro_batch(self, last: bool) -> None:
        """See ``GradientSync``."""
        self._last = last
        self._root.set_is_last_backward(last)
        self._root.set_requires_gradient_sync(last or self._stage >= 2)
        self._root.set_reshard_after_backward(last or self._stage == 3)

    def finish(self) -> None:
        """See ``GradientSync``. FSDP2 has done it all at the end of the last backward."""
        assert self._last, "finish() comes after the backward of micro_batch(last=True)"
        self._last = False

    def _after_forward(self, *_: Any) -> None:
        """Return to shards after a forward without a backward, which would have done it.

        Otherwise the next step would compute with the parameters that evaluation gathered, and
        whoever lists parameters in between would find whole copies that nobody trains.
        """
        if not torch.is_grad_enabled():
            for unit in self._units:
                unit.reshard()


def shard_model(
    model: Transformer, mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    """Apply ``fully_shard`` to embedding, blocks and the whole, inside out.

    In bf16, blocks and head are gathered in bf16: the modules would cast to it anyway. The
    embedding is gathered as it is, because its gradient adds up over the tokens of a batch: in
    bf16 a frequent token would lose most of them. Inputs are never cast.
    """
    low = compute_dtype if compute_dtype.itemsize < 4 else None
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = MixedPrecisionPolicy(
        param_dtype=low,
        reduce_dtype=None if low is None else torch.float32,
        cast_forward_inputs=False,
    )
    # A tied embedding is needed again by the head; the backward of a look-up needs no table.
    fully_shard(
        model.embedding,
        mesh=mesh,
        mp_policy=plain,
        reshard_after_forward=reshard_after_forward and not model.tied,
    )
    if not model.tied:
        model.embedding.set_unshard_in_backward(False)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, mp_policy=mixed, reshard_after_forward=reshard_after_forward)
    # Backward begins with norm and head: freeing them after forward would only gather them again.
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
