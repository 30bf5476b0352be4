"""Gradient reduction: flat buckets over hdp, and sums of replicated parameters over tp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from allometry.models.init import held
from allometry.parallel.mesh import Axis, local
from allometry.parallel.wire import sum_over


class GradientSync(Protocol):
    """Sum of gradients over the hdp ranks, once per step.

    The loop of a step, on every rank with the same number of micro-batches::

        optimizer.zero_grad(set_to_none=True)
        for i in range(n):
            sync.micro_batch(last=i == n - 1)
            sync.backward(model(...).total / global_count)
        sync.finish()

    After ``finish`` the ``.grad`` of each parameter is the SUM over ranks and micro-batches (not an
    average: the loss was divided by the global count), reduced in fp32 (fp64 for fp64 parameters)
    and sharded like the parameter. Forward passes under ``no_grad`` may run before or after a step,
    not within a step. In a pipeline each stage has its own last backward: the pipeline calls
    ``close`` and ``closed`` around this backward instead of ``micro_batch``, and autograd instead
    of ``backward``.
    """

    @property
    def whole(self) -> bool:
        """True if each rank has the unsharded parameters at all times."""
        return False

    def hold(self, owner: nn.Module, name: str) -> AbstractContextManager[Tensor]:
        """Return a context with parameter ``name`` of ``owner``, or this rank's shard, to write."""
        return held(owner, name)

    @property
    def makes_parameters(self) -> bool:
        """True if ``hold`` allocates parameters; each is unsharded only within the context."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch."""
        loss.backward()

    def micro_batch(self, last: bool) -> None:
        """Prepare the next forward and backward; ``last``: the last micro-batch of the step."""

    def close(self, part: nn.Module) -> None:
        """Prepare the last backward of this step through ``part``, a pipeline stage."""

    def closed(self, part: nn.Module) -> None:
        """Finish the last backward: gradients of ``part`` do not change any more in this step."""

    def begin_uneven(self) -> bool:
        """Prepare a step in which ranks run different numbers of micro-batches, including zero.

        Called instead of ``micro_batch``, before all micro-batches. All ranks gather their
        parameters in this call, and gradients are reduced only after all ranks have run their
        micro-batches, because a rank may be waiting for another rank's ring. Returns True if every
        rank must call ``micro_batch(last=True)`` and run a micro-batch without targets before
        ``finish``.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Gather parameters once for forward passes without gradients, as ``begin_uneven`` does."""

    def finish(self) -> None:
        """Complete the reduction after the last backward."""

    def leave(self) -> None:
        """Release resources outside the memory of this process, at the end of a run."""
        return


ReductionGroup = tuple[Sequence[nn.Parameter], Axis]
"""Parameters, and the axis of ranks that have the same parameters and other micro-batches."""


class FlatReducer(GradientSync):
    """ZeRO stage 0: sum unsharded gradients in a few flat fp32 buckets, then over ``tp``.

    ``groups`` returns the parameters by the axis of ranks that have the same parameters: hdp for
    most, edp for experts that are sharded over ep ranks. The function is called at the first step,
    because moving off the meta device creates new parameters.

    An axis of one rank has no bucket: gradients stay unchanged. Otherwise gradients are copied into
    buckets, and ``.grad`` becomes a view of its bucket, which saves the copy back. The next
    ``zero_grad(set_to_none=True)`` drops the views, and autograd creates new gradients in the first
    micro-batch without a zero-fill or an addition.

    ``overlap``: copy and reduce a bucket during the last backward, as soon as its last gradient is
    complete; in a pipeline during the backwards of other stages or earlier blocks. This suits CUDA,
    where communication has its own hardware. Otherwise all buckets are reduced in ``finish``.
    ``keep``: keep the memory of buckets between steps. On a CPU new pages cost more than the copy;
    a GPU, where memory is scarce, releases buckets with their views. A parameter without a gradient
    on some rank counts as zero on this rank.
    """

    def __init__(
        self,
        groups: Callable[[], Sequence[ReductionGroup]],
        tp: Axis,
        bucket_bytes: int,
        overlap: bool,
        keep: bool | None = None,
    ) -> None:
        self._find_groups = groups
        self._groups: Sequence[ReductionGroup] = ()
        self._tp = tp
        self._bucket_bytes = bucket_bytes
        self._overlap = overlap
        self._keep = not overlap if keep is None else keep
        self._buckets: list[_Bucket] | None = None
        self._launched = 0
        self._final: set[int] = set()  # ids of parameters whose next gradient is final

    @property
    @override
    def whole(self) -> bool:
        return True

    @override
    def micro_batch(self, last: bool) -> None:
        buckets = self._made()
        self._final = {id(p) for bucket in buckets for p in bucket.parameters} if last else set()

    @override
    def close(self, part: nn.Module) -> None:
        self._made()
        self._final |= {id(parameter) for parameter in part.parameters()}

    @override
    def closed(self, part: nn.Module) -> None:
        if self._overlap:
            # Half a backward calls no hooks, and a parameter may have no gradient.
            for bucket in self._made():
                bucket.awaited -= {id(parameter) for parameter in part.parameters()}
            self._launch_ready()

    @override
    def begin_uneven(self) -> bool:
        self.micro_batch(last=False)
        return False

    @override
    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    @override
    def finish(self) -> None:
        buckets = self._made()
        self._final = set()
        while self._launched < len(buckets):
            self._launch_next()
        for bucket in buckets:
            bucket.wait()
        self._launched = 0
        sum_over_tp((p for parameters, _ in self._groups for p in parameters), self._tp)

    def _made(self) -> list[_Bucket]:
        if self._buckets is None:
            self._groups = self._find_groups()
            self._buckets = [
                bucket
                for parameters, axis in self._groups
                if axis.size > 1
                for bucket in self._make_buckets(parameters, axis)
            ]
        return self._buckets

    def _make_buckets(self, parameters: Sequence[nn.Parameter], axis: Axis) -> Iterator[_Bucket]:
        # Last parameter first: the order in which the backward completes gradients.
        waiting: list[nn.Parameter] = []
        bytes_waiting = 0
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            wide = _wide(parameter.dtype)
            size = local(parameter).numel() * wide.itemsize
            other = waiting and _wide(waiting[0].dtype) != wide
            if waiting and (other or bytes_waiting + size > self._bucket_bytes):
                yield self._make_bucket(waiting, axis)
                waiting, bytes_waiting = [], 0
            waiting.append(parameter)
            bytes_waiting += size
        if waiting:
            yield self._make_bucket(waiting, axis)

    def _make_bucket(self, parameters: list[nn.Parameter], axis: Axis) -> _Bucket:
        bucket = _Bucket(parameters, axis.group, keep=self._keep)
        if self._overlap:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda parameter, bucket=bucket: self._ready(parameter, bucket)
                )
        return bucket

    def _ready(self, parameter: Tensor, bucket: _Bucket) -> None:
        """Post-accumulate hook: mark a final gradient of ``bucket`` as complete."""
        if id(parameter) in self._final:
            bucket.awaited.discard(id(parameter))
            self._launch_ready()

    def _launch_ready(self) -> None:
        assert self._buckets is not None
        # Strictly in order, even if a later bucket is complete first: all ranks must issue the same
        # collectives in the same order, even if some gradients are missing.
        while self._launched < len(self._buckets) and not self._buckets[self._launched].awaited:
            self._launch_next()

    def _launch_next(self) -> None:
        assert self._buckets is not None
        self._buckets[self._launched].launch()
        self._launched += 1


class _Bucket:
    """Parameters that are reduced together, with their flat buffer.

    ``keep``: keep the buffer between steps instead of allocating it at each launch.
    """

    def __init__(
        self, parameters: list[nn.Parameter], group: dist.ProcessGroup, keep: bool
    ) -> None:
        self.parameters = parameters
        self.awaited = set(map(id, parameters))
        self._group = group
        self._keep = keep
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    @torch.no_grad()
    def launch(self) -> None:
        """Copy the gradients into the buffer and start the all-reduce."""
        if self._flat is None:
            first = local(self.parameters[0])
            size = sum(local(p).numel() for p in self.parameters)
            self._flat = torch.empty(size, dtype=_wide(first.dtype), device=first.device)
        views, gradients = [], []
        for parameter, view in self._views():
            if parameter.grad is None:
                view.zero_()
            else:
                views.append(view)
                gradients.append(local(parameter.grad))
        if views:
            torch._foreach_copy_(views, gradients)
        del views, gradients
        # Release the original gradients now: the rest of the backward can use their memory.
        for parameter, view in self._views():
            if parameter.dtype == view.dtype:
                parameter.grad = _like(parameter, view)
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for the sums (on CUDA: order the current stream after the all-reduce)."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        self.awaited = set(map(id, self.parameters))
        for parameter, view in self._views():
            if parameter.dtype != view.dtype:  # ``.grad`` must have the parameter's type
                parameter.grad = _like(parameter, view.to(parameter.dtype))
        if not self._keep:
            self._flat = None

    def _views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        assert self._flat is not None
        locals_ = [local(p) for p in self.parameters]
        parts = self._flat.split([tensor.numel() for tensor in locals_])
        for parameter, tensor, part in zip(self.parameters, locals_, parts, strict=True):
            yield parameter, part.view(tensor.shape)


@torch.no_grad()
def sum_over_tp(parameters: Iterable[nn.Parameter], tp: Axis) -> None:
    """Sum, in place, the gradients of parameters that are replicated over tp.

    Each tp rank computes with other tokens or other heads, so its gradient of a replicated
    parameter is a partial sum (``models.layers.local``). All gradients are sent in one message, in
    fp32 (fp64 if gradients are fp64). The call is the last step of a reduction: the gradients, or
    this rank's shards of them, are already summed over hdp. Every rank of ``tp`` calls this
    function with the same parameters.
    """
    if tp.size == 1:
        return
    gradients = [
        local(parameter.grad)
        for parameter in parameters
        if parameter.grad is not None and is_replicated_over_tp(parameter)
    ]
    if gradients:
        dtype = _wide(gradients[0].dtype)
        flat = torch.cat([gradient.flatten().to(dtype) for gradient in gradients])
        sum_over(flat, tp.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [p.view(g.shape) for p, g in zip(parts, gradients, strict=True)]
        )


def is_replicated_over_tp(parameter: Tensor) -> bool:
    """Return True if a parameter distributed by ``tensor.py`` is replicated over tp."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    placed = dict(zip(names, parameter.placements, strict=True))
    return "tp" in placed and placed["tp"].is_replicate()


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """Return ``local`` with the placements of ``parameter``: a DTensor if the parameter is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
