"""A counted schedule: what a rank computes while its messages travel, without a device.

One rank of a simulated mesh (``simulate.py``) runs a step's own code on tensors without storage.
The log notes, in the order in which the host asks for them, messages begun, messages waited for and
products with their FLOPs. A device with streams of its own for messages can hide one behind the
FLOPs between its two ends, and behind nothing else.

FSDP2 waits with events of its streams, of which a CPU has none. As it orders them on CUDA: a gather
is waited for where its copy is taken apart, a reduction where the next one begins or, the last,
where the backward ends.
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
    """A collective, what asked for it, and the FLOPs asked for before it was begun and ended."""

    call: Collective
    owner: str
    begun: int
    ended: int | None = None

    @property
    def behind(self) -> int:
        """FLOPs of products that it can hide behind; 0 for one that is waited for at once."""
        assert self.ended is not None, self
        return self.ended - self.begun


class OverlapLog(CollectiveLog):
    """Notes messages with what is computed meanwhile, while it is active.

    ``flops``: of all products so far. ``messages``: in the order in which they were begun; those
    that nobody has waited for when the log ends are ended there.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self.messages: list[Message] = []
        self.flops = 0
        self._owner = ""
        self._moving: dict[int, Message] = {}  # by the storage that is being filled
        self._gathers: dict[int, Message] = {}  # by FSDP2's group
        self._reductions: list[Message] = []
        self._keep: list[Any] = []  # storages, so that no address comes twice
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
                self._end(message)  # whoever begins it otherwise waits for it at once
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
    """What a collective returns that is not waited for."""

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
    """Run two micro-batches and the reduction of one simulated rank; return what was asked for.

    Parts are materialized and experts even (``simulate.py``); ``inputs(part)`` is a micro-batch.
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
