"""Storages of all tensors from creation to release, with moment and module.

A ``TorchDispatchMode`` sees each operator's results in forward, backward and optimizer, on any
device; a weak reference to a storage reports its release, and resizing (by which FSDP2 frees
gathered parameters) is recorded as well. Memory that a kernel allocates inside of one operator is
not seen; ``AllocatorLog`` includes it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

FORWARD, HEAD, BACKWARD, UPDATE, BETWEEN = (
    "forward",
    "head",
    "backward",
    "optimizer step",
    "between",
)


@dataclass(slots=True)
class Stored:
    """One storage: the moments of its creation and release (None: not released)."""

    born: str
    scope: str
    operator: str
    last_dim: int
    half: bool
    fp8: bool
    of_weight: bool
    kind: str | None = None
    died: str | None = None
    resized: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Allocated or freed (negative) bytes of a storage, at a moment of a step."""

    storage: int
    bytes: int
    moment: str
    scope: str


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that records creation and release of storages while active.

    Enter it before the model is created: earlier storages are not counted. ``mark`` sets the kind
    of a tensor's storage; ``watch`` records the names of modules during their forward passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.stored: list[Stored] = []
        self._alive: dict[
            int, tuple[int, int, Any]
        ] = {}  # address -> number, bytes, weak reference
        self._scopes: list[str] = []
        self._updating = False

    def __enter__(self) -> LiveBytes:
        """Start recording."""
        storage_class: Any = torch.UntypedStorage
        self._resize = resize = storage_class.resize_

        def noted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            self._note(storage, None)
            return result

        storage_class.resize_ = noted
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Stop recording."""
        super().__exit__(*raised)
        storage_class: Any = torch.UntypedStorage
        storage_class.resize_ = self._resize

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` and record new storages of its results."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a DTensor calls operators on its local tensors
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, func, args)
        return result

    @property
    def moment(self) -> str:
        """Current moment of the step."""
        if self._updating:
            return UPDATE
        if torch._C._current_graph_task_id() != -1:
            return BACKWARD
        if not self._scopes:
            return BETWEEN
        return HEAD if any(scope.endswith("head") for scope in self._scopes) else FORWARD

    def mark(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Set the kind of the current storages of these tensors."""
        for tensor in tensors:
            if tensor is not None:
                part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                storage = part.untyped_storage()
                self._note(storage, None)
                found = self._alive.get(storage._cdata)
                if found is not None:
                    self.stored[found[0]].kind = kind

    @contextmanager
    def watch(self, modules: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Return a context in which forward passes of these modules are recorded by name."""
        hooks = []

        def before(name: str) -> Callable[..., None]:
            return lambda *_: self._scopes.append(name)

        def after(*_: Any) -> None:
            self._scopes.pop()

        for name, module in modules:
            hooks.append(module.register_forward_pre_hook(before(name), prepend=True))
            hooks.append(module.register_forward_hook(after, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def updating(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Return a context in which steps of this optimizer are recorded."""
        hooks = [
            optimizer.register_step_pre_hook(lambda *_: setattr(self, "_updating", True)),
            optimizer.register_step_post_hook(lambda *_: setattr(self, "_updating", False)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _see(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> None:
        # A wrapper's storage reports a size but has no memory: the wrapped tensors have been seen.
        if is_traceable_wrapper_subclass(tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        self._note(storage, lambda: self._born(tensor, func, args))

    def _born(self, tensor: Tensor, func: Any, args: tuple[Any, ...]) -> Stored:
        name = func._schema.name
        of_weight = name == "aten::_to_copy" and any(
            (found := self._alive.get(arg.untyped_storage()._cdata)) is not None
            and (self.stored[found[0]].kind == "parameters" or self.stored[found[0]].of_weight)
            for arg in _tensors(args)
        )
        return Stored(
            born=self.moment,
            scope=self._scopes[-1] if self._scopes else "",
            operator=name,
            last_dim=tensor.shape[-1] if tensor.dim() else 0,
            half=tensor.dtype in (torch.bfloat16, torch.float16),
            fp8=tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2),
            of_weight=of_weight,
        )

    def _note(self, storage: Any, born: Callable[[], Stored] | None) -> None:
        """Record a storage's size if it is new or has changed."""
        address, size = storage._cdata, storage.nbytes()
        found = self._alive.get(address)
        if found is None:
            number = len(self.stored)
            made = (
                born()
                if born
                else Stored(
                    self.moment, self._scope, "resize", 0, half=False, fp8=False, of_weight=False
                )
            )
            self.stored.append(made)
            gone = weakref.ref(storage, lambda _: self._died(address))
            self._alive[address] = number, size, gone
            self._log(number, size)
        elif found[1] != size:
            self._alive[address] = found[0], size, found[2]
            self.stored[found[0]].resized = True
            self._log(found[0], size - found[1])

    def _died(self, address: int) -> None:
        number, size, _ = self._alive.pop(address)
        self.stored[number].died = self.moment
        self._log(number, -size)

    def _log(self, number: int, change: int) -> None:
        if change:
            self.events.append(Event(number, change, self.moment, self._scope))

    @property
    def _scope(self) -> str:
        return self._scopes[-1] if self._scopes else ""


@dataclass(frozen=True)
class Peak:
    """Peak of allocated bytes: moment, module, and bytes of each kind."""

    bytes: int
    moment: str
    scope: str
    kinds: dict[str, int]


def peak_of(
    live: LiveBytes, kind_of: Callable[[Stored], str], begin: int = 0, at: str | None = None
) -> Peak:
    """Return the peak among the events from number ``begin`` on; ``kind_of`` names each storage.

    ``at``: consider only events of this moment. For example,
    ``peak_of(live, kind_of(config.model)).kinds``.
    """
    total = best = place = 0
    for index, event in enumerate(live.events):
        total += event.bytes
        if index >= begin and at in (None, event.moment) and total > best:
            best, place = total, index
    kinds: Counter[str] = Counter()
    for event in live.events[: place + 1]:
        kinds[kind_of(live.stored[event.storage])] += event.bytes
    there = live.events[place]
    return Peak(best, there.moment, there.scope, {kind: n for kind, n in kinds.items() if n})


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
