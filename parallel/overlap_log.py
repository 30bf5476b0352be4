"""Overlap of communication and computation of one simulated rank, counted in FLOPs.

One rank of a simulated mesh (``simulate.py``) runs the code of a step on tensors without storage.
The log records starts of messages, waits for messages, and products with their FLOPs, in the order
of the host's calls. A device with separate communication streams can hide a message behind exactly
the FLOPs between its start and its wait.

FSDP2 waits with stream events, which a CPU lacks. The log applies the order that FSDP2 has on CUDA:
an all-gather is awaited when its copy-out starts; a reduction is awaited when the next reduction
starts, or, for the last one, when the backward pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.utils.flop_counter import flop_registry

from allometry.parallel.mesh import Mesh
from allometry.parallel.simulate import Collective, CollectiveLog


@dataclass
class Message:
    """A collective, its issuer, and the FLOPs issued before its start and before its end."""

    call: Collective
    owner: str
    begun: int
    ended: int | None = None

    @property
    def behind(self) -> int:
        """FLOPs of products that can hide the message; 0 if it is awaited immediately."""
        assert self.ended is not None, self
        return self.ended - self.begun


class OverlapLog(CollectiveLog):
    """Log of messages and of the FLOPs issued between start and end of each message.

    ``flops``: of all products so far. ``messages``: in order of their start; messages that are
    never awaited end with the log. For example, ``[message.behind for message in log.messages]``.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.messages: list[Message] = []
        self.flops = 0
        self._owner = ""
        self._moving: dict[int, Message] = {}  # by the storage to be filled
        self._gathers: dict[int, Message] = {}  # by FSDP2's parameter group
        self._reductions: list[Message] = []
        self._keep: list[Any] = []  # kept alive so that addresses are unique
        self._patches = ExitStack()

    def __enter__(self) -> OverlapLog:
        for name in ("unshard", "wait_for_unshard", "post_backward", "finalize_backward"):
            around = getattr(self, f"_{name}")
            original = getattr(FSDPParamGroup, name)
            self._patches.enter_context(
                mock.patch.object(FSDPParamGroup, name, _around(around, original))
            )
        self._patches.enter_context(mock.patch.object(dist, "all_reduce", self._all_reduce))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        for message in self.messages:
            self._end(message)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before = len(self.calls)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.calls) > before:
            message = Message(self.calls[-1], self._owner, self.flops)
            self.messages.append(message)
            if "functional" in func._schema.name and isinstance(result, Tensor):
                self._keep.append(result)
                self._moving[_place(result)] = message
            elif not self._owner:
                self._end(message)  # other callers wait immediately
        elif func._schema.name.endswith("::wait_tensor"):
            moving = self._moving.pop(_place(args[0]), None)
            if moving is not None:
                self._end(moving)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _end(self, message: Message) -> None:
        if message.ended is None:
            message.ended = self.flops

    @contextmanager
    def _by(self, owner: str) -> Iterator[None]:
        outer, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = outer

    def _all_reduce(self, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        original: Callable[..., Any] = dist.distributed_c10d.all_reduce
        if not async_op:
            return original(*args, **kwargs)
        with self._by("bucket"):
            original(*args, async_op=True, **kwargs)
        return _Work(self, self.messages[-1])

    @contextmanager
    def _unshard(self, group: FSDPParamGroup) -> Iterator[None]:
        before = len(self.messages)
        with self._by(f"gather {_name(group)}"):
            yield
        for message in self.messages[before:]:
            self._gathers[id(group)] = message

    @contextmanager
    def _wait_for_unshard(self, group: FSDPParamGroup) -> Iterator[None]:
        gather = self._gathers.pop(id(group), None)
        if gather is not None:
            self._end(gather)
        yield

    @contextmanager
    def _post_backward(self, group: FSDPParamGroup) -> Iterator[None]:
        before = len(self.messages)
        with self._by(f"reduce {_name(group)}"):
            yield
        if made := self.messages[before:]:
            for message in self._reductions:
                message.ended = message.ended or made[0].begun
            self._reductions = made

    @contextmanager
    def _finalize_backward(self, group: FSDPParamGroup) -> Iterator[None]:
        for message in self._reductions:
            self._end(message)
        self._reductions = []
        yield


class _Work:
    """Work handle of an asynchronous collective."""

    def __init__(self, log: OverlapLog, message: Message) -> None:
        self._log, self._message = log, message

    def wait(self) -> None:
        self._log._end(self._message)


def _around(context: Callable[[Any], Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def method(group: Any, *args: Any, **kwargs: Any) -> Any:
        with context(group):
            return original(group, *args, **kwargs)

    return method


def _name(group: FSDPParamGroup) -> str:
    return group._module_fqn or "root"


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step_messages(
    parallel: Any, mesh: Mesh, inputs: Callable[[Any], tuple[Any, ...]]
) -> OverlapLog:
    """Run two micro-batches and the gradient reduction of one simulated rank; return the log.

    Parts must be materialized, with even experts (``simulate.py``). ``inputs(part)`` returns the
    arguments of a micro-batch.
    """
    with OverlapLog(mesh) as log:
        for last in (False, True):
            parallel.sync.micro_batch(last)
            for part in parallel.parts.values():
                made = part(*inputs(part))
                total = made if isinstance(made, Tensor) else made.total
                total.float().sum().backward()
                part.take_statistics()
        parallel.sync.finish()
    return log
