"""Summing gradients: whole ones in flat buckets over hdp, those of replicas over tp."""

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
    """Sums gradients over the hdp ranks, once a step.

    The loop of a step, on every rank with the same number of micro-batches::

        optimizer.zero_grad(set_to_none=True)
        for i in range(n):
            sync.micro_batch(last=i == n - 1)
            sync.backward(model(...).total / global_count)
        sync.finish()

    After ``finish`` each parameter's ``.grad`` is the SUM over ranks and micro-batches (nothing is
    averaged: the loss was divided by the global count), reduced in fp32 (fp64 where parameters
    are) and laid out as the parameter is. Forward passes under ``no_grad`` may run before or after
    a step, not within one. A pipeline, in which each stage has a last backward of its own, calls
    ``close`` and ``closed`` around that instead of ``micro_batch``, and autograd instead of
    ``backward``.
    """

    @property
    def whole(self) -> bool:
        """Whether each rank has the whole parameters at all times."""
        return False

    def hold(self, owner: nn.Module, name: str) -> AbstractContextManager[Tensor]:
        """Hold parameter ``name`` of ``owner``, or this rank's part of it, to give it values."""
        return held(owner, name)

    @property
    def makes_parameters(self) -> bool:
        """Whether ``hold`` gives parameters their storage: each is whole only while it is held."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a micro-batch."""
        loss.backward()

    def micro_batch(self, last: bool) -> None:
        """Announce the next forward and backward; ``last``: the step's last one."""

    def close(self, part: nn.Module) -> None:
        """Announce the last backward of this step through ``part``, a stage of a pipeline."""

    def closed(self, part: nn.Module) -> None:
        """Tell that it is done: no gradient of ``part`` will change in this step."""

    def begin_uneven(self) -> bool:
        """Announce a step in which ranks run different numbers of micro-batches, none included.

        In place of ``micro_batch``, before any of them. All ranks gather here what they compute
        with, and nothing is reduced until all have run, as a rank may be waiting for another's
        ring. Returns whether ``micro_batch(last=True)`` and a micro-batch that counts nothing must
        follow before ``finish``, on every rank, for the sums to be made.
        """

    def gathered(self) -> AbstractContextManager[None]:
        """Gather parameters once for forward passes without gradients, as ``begin_uneven`` does."""

    def finish(self) -> None:
        """Complete the reduction after the last backward."""

    def leave(self) -> None:
        """Give up, at the end of a run, what lies outside of this process's memory."""
        return


ReductionGroup = tuple[Sequence[nn.Parameter], Axis]
"""Parameters, and the axis of ranks that hold the same ones and see different micro-batches."""


class FlatReducer(GradientSync):
    """ZeRO stage 0: whole gradients, summed in a few flat buckets of fp32, then over ``tp``.

    ``groups`` returns the parameters by the axis of ranks that hold the same ones: hdp for most,
    edp for experts that are spread over ep ranks. It is called at the first step, as moving off
    the meta device makes new parameters.

    An axis of one rank needs no bucket: gradients stay as autograd made them. Otherwise they are
    copied into buckets, and ``.grad`` becomes a view of its bucket, so nothing is copied back.
    The next ``zero_grad(set_to_none=True)`` drops the views; autograd then hands over fresh
    gradients as if we did not exist, without a zero-fill or an addition in the first micro-batch.

    ``overlap``: copy and reduce a bucket during the last backward, once its last gradient is
    there; in a pipeline while other stages of the rank, or earlier blocks, still have theirs. That
    is right for CUDA, where communication has its own hardware. Without it all are
    reduced in ``finish``. ``keep``: hold the buckets' memory from step to step, as a CPU pays more
    for fresh pages than for the copy; a GPU, where memory is short, gives it back with the views.

    A parameter that has no gradient on some rank counts as zero there.
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
        self._final: set[int] = set()  # ids of parameters whose next gradient is their last

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
            # Half a backward calls no hooks, and some parameter may have had no gradient.
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
        # Last parameter first: the order in which backward completes gradients.
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
        """One more gradient of ``bucket`` has come, maybe its last in this step."""
        if id(parameter) in self._final:
            bucket.awaited.discard(id(parameter))
            self._launch_ready()

    def _launch_ready(self) -> None:
        assert self._buckets is not None
        # Strictly in order, also when a later bucket is complete first: all ranks must issue the
        # same collectives in the same order, whichever gradients they lack.
        while self._launched < len(self._buckets) and not self._buckets[self._launched].awaited:
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
        self.awaited = set(map(id, parameters))
        self._group = group
        self._keep = keep
        self._flat: Tensor | None = None
        self._work: dist.Work | None = None

    @torch.no_grad()
    def launch(self) -> None:
        """Copy the gradients in and start to sum them."""
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
        # The originals go now, not at the end: their memory serves the rest of the backward.
        for parameter, view in self._views():
            if parameter.dtype == view.dtype:
                parameter.grad = _like(parameter, view)
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    @torch.no_grad()
    def wait(self) -> None:
        """Let the sums arrive (on CUDA: order the current stream after them)."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        self.awaited = set(map(id, self.parameters))
        for parameter, view in self._views():
            if parameter.dtype != view.dtype:  # autograd insists on the parameter's type
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
    """Sum, in place, the gradients of parameters that every tp rank holds whole.

    Each tp rank sees other tokens or other heads, so its gradient of such a parameter is a summand
    (``models.layers.local``). All travel in one message, in fp32 (fp64 where gradients are). This
    ends a reduction: it sums over tp what has been summed over hdp, or this rank's shards of that.
    Every rank of ``tp`` calls it with the same parameters.
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
    """Return whether every tp rank holds the same values of a parameter cut by ``tensor.py``."""
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    placed = dict(zip(names, parameter.placements, strict=True))
    return "tp" in placed and placed["tp"].is_replicate()


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """Return ``local`` placed as ``parameter``: a DTensor where that is one."""
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
