"""Summing gradients that are whole: in flat buckets over hdp, after partial ones over tp."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    are) and laid out as the parameter is. Forward passes under ``no_grad`` may run before or after
    a step, not within one. A pipeline, whose schedule knows which backward is the last, leaves
    ``micro_batch`` out.
    """

    def micro_batch(self, last: bool) -> None:
        """Announce the next forward and backward; ``last``: the step's last one."""

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


Line = tuple[Sequence[nn.Parameter], Axis]
"""Parameters, and the ranks that hold the same ones."""


class FlatReducer:
    """ZeRO stage 0: whole gradients, summed over their lines in a few flat buckets of fp32.

    ``lines`` returns the parameters by the line of ranks that hold the same ones: hdp for most;
    for experts that are spread over ep ranks, the ranks that hold the same experts. It is called
    at the first step, as moving off the meta device makes new parameters.

    A line of one needs no bucket: gradients stay as autograd made them. Otherwise they are copied
    into buckets, and ``.grad`` becomes a view of its bucket, so nothing is copied back.
    The next ``zero_grad(set_to_none=True)`` drops the views; autograd then hands over fresh
    gradients as if we did not exist, without a zero-fill or an addition in the first micro-batch.

    ``overlap``: copy and reduce a bucket during the last backward, once its last gradient is
    there. That is right for CUDA, where communication has its own hardware. Without it all are
    reduced in ``finish``. ``keep``: hold the buckets' memory from step to step, as a CPU pays more
    for fresh pages than for the copy; a GPU, where memory is short, gives it back with the views.

    A parameter that has no gradient on some rank counts as zero there. Parameters cut over tp are
    DTensors; where their gradient is a partial sum (norms, whose ranks see different tokens), it
    is summed over tp first.
    """

    def __init__(
        self,
        lines: Callable[[], Sequence[Line]],
        bucket_bytes: int,
        overlap: bool,
        keep: bool | None = None,
    ) -> None:
        self._find_lines = lines
        self._lines: Sequence[Line] = ()
        self._bucket_bytes = bucket_bytes
        self._overlap = overlap
        self._keep = not overlap if keep is None else keep
        self._buckets: list[_Bucket] | None = None
        self._launched = 0
        self._last = False

    def micro_batch(self, last: bool) -> None:
        """See ``GradientSync``."""
        self._last = last
        for bucket in self._made():
            bucket.awaited = len(bucket.parameters)

    def begin_uneven(self) -> bool:
        """See ``GradientSync``."""
        self.micro_batch(last=False)
        return False

    def gathered(self) -> AbstractContextManager[None]:
        """See ``GradientSync``."""
        return nullcontext()

    def finish(self) -> None:
        """See ``GradientSync``."""
        buckets = self._made()
        self._last = False
        while self._launched < len(buckets):
            self._launch_next()
        for bucket in buckets:
            bucket.wait()
        self._launched = 0
        for parameters, line in self._lines:
            if line.size == 1:
                settle(parameters)

    def _made(self) -> list[_Bucket]:
        if self._buckets is None:
            self._lines = self._find_lines()
            self._buckets = [
                bucket
                for parameters, line in self._lines
                if line.size > 1
                for bucket in self._make_buckets(parameters, line)
            ]
        return self._buckets

    def _make_buckets(self, parameters: Sequence[nn.Parameter], line: Axis) -> Iterator[_Bucket]:
        # Last parameter first: the order in which backward completes gradients.
        waiting: list[nn.Parameter] = []
        bytes_waiting = 0
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            wide = _wide(parameter.dtype)
            size = _local(parameter).numel() * wide.itemsize
            other = waiting and _wide(waiting[0].dtype) != wide
            if waiting and (other or bytes_waiting + size > self._bucket_bytes):
                yield self._make_bucket(waiting, line)
                waiting, bytes_waiting = [], 0
            waiting.append(parameter)
            bytes_waiting += size
        if waiting:
            yield self._make_bucket(waiting, line)

    def _make_bucket(self, parameters: list[nn.Parameter], line: Axis) -> _Bucket:
        bucket = _Bucket(parameters, line.group, keep=self._keep)
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
        settle(self.parameters)
        if self._flat is None:
            first = _local(self.parameters[0])
            size = sum(_local(p).numel() for p in self.parameters)
            self._flat = torch.empty(size, dtype=_wide(first.dtype), device=first.device)
        views, gradients = [], []
        for parameter, view in self._views():
            if parameter.grad is None:
                view.zero_()
            else:
                views.append(view)
                gradients.append(_local(parameter.grad))
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
        for parameter, view in self._views():
            if parameter.dtype != view.dtype:  # autograd insists on the parameter's type
                parameter.grad = _like(parameter, view.to(parameter.dtype))
        if not self._keep:
            self._flat = None

    def _views(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        assert self._flat is not None
        locals_ = [_local(p) for p in self.parameters]
        parts = self._flat.split([tensor.numel() for tensor in locals_])
        for parameter, tensor, part in zip(self.parameters, locals_, parts, strict=True):
            yield parameter, part.view(tensor.shape)


@torch.no_grad()
def settle(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients that are partial over a mesh dimension, all of one kind in one message.

    Afterwards every gradient is placed as its parameter. Ranks of a tensor group call this with
    the same parameters. Anything but partial sums of replicated parameters is an error.
    """
    partial: dict[tuple[dist.ProcessGroup, torch.dtype], list[tuple[nn.Parameter, Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            assert gradient is None or isinstance(gradient, DTensor) == isinstance(
                parameter, DTensor
            )
            continue
        for dim, (has, wants) in enumerate(
            zip(gradient.placements, parameter.placements, strict=True)
        ):
            if has == wants:
                continue
            assert has.is_partial("sum"), has
            assert wants.is_replicate(), wants
            local = gradient.to_local().contiguous()
            group = gradient.device_mesh.get_group(dim)
            partial.setdefault((group, local.dtype), []).append((parameter, local))
    for (group, _), held in partial.items():
        flat = torch.cat([local.flatten() for _, local in held])
        dist.all_reduce(flat, group=group)
        parts = flat.split([local.numel() for _, local in held])
        for (parameter, local), part in zip(held, parts, strict=True):
            parameter.grad = _like(parameter, part.view(local.shape))


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


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
