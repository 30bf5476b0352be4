"""CUDA graph on a CPU: record a function's device operations and replay them without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Record operators with the tensors that they read and wrote, as a graph keeps addresses.

    ``replay`` runs the operators again and writes results to the recorded tensors. Python
    computations of the function, and tensors created anew in each call, are not replayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero"):
            raise RuntimeError("operation not permitted when stream is capturing")
        self._keep_what_is_written(function, args, kwargs)
        result = function(*args, **kwargs)
        inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        fresh = [x for x in fresh if storage(x) not in inputs]
        self._made |= {storage(x) for x in fresh}
        self._steps.append((function, args, kwargs, fresh))
        return result

    def _keep_what_is_written(self, function: Any, args: Any, kwargs: Any) -> None:
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for x in value if isinstance(value, list | tuple) else [value]:
                if x is not None and storage(x) not in self._made | self._before.keys():
                    # The full storage: tensors written one after another may share it.
                    whole = x.untyped_storage()
                    self._before[storage(x)] = whole, whole.clone()

    def undo(self) -> None:
        """Restore tensors from outside that were written: recording must have no effect."""
        for whole, value in self._before.values():
            whole.copy_(value)

    def replay(self) -> None:
        """Run all recorded operators again."""
        with torch.no_grad():
            for function, args, kwargs, fresh in self._steps:
                again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
                for kept, new in zip(fresh, again, strict=bool(fresh)):
                    kept.copy_(new)


def storage(tensor: Tensor) -> int:
    """Return an id that differs between tensors with separate storage."""
    return tensor.untyped_storage()._cdata


def capture_on_tape(function: Callable[[], None]) -> Callable[[], None]:
    """Record ``function`` as a graph; a ``parallel.graphs.Capture``."""
    tape = Tape()
    with tape:
        function()
    tape.undo()
    return tape.replay
