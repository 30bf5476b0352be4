"""Detect operations that would make the host wait for a GPU, in a step on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Methods that read memory on a CPU without an operator.
_READS = frozenset(
    {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
)
# Functions that copy Python numbers to a GPU from unpinned memory.
_COPIES = frozenset({"tensor", "as_tensor", "from_numpy"})
# Operators whose result, or its shape, depends on data.
_OPERATORS = frozenset(
    {
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "nonzero",
        "nonzero_numpy",
        "masked_select",
        "unique_dim",
        "_unique",
        "_unique2",
        "unique_consecutive",
        "bincount",
        "equal",
        "allclose",
    }
)


@contextmanager
def host_reads(allowed: Iterable[Tensor] = ()) -> Iterator[list[str]]:
    """Collect transfers of tensor values to or from the host, as "operation at file:line".

    ``allowed``: tensors that stay on the host when the model is on a GPU. Operators are observed in
    forward and backward passes and inside other functions, including operators that read values
    only on a CPU.
    """
    found: list[str] = []
    host = {tensor.untyped_storage().data_ptr() for tensor in allowed}

    def note(name: str, inputs: Iterable[Any]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not all(x.untyped_storage().data_ptr() in host for x in tensors):
            found.append(f"{name} at {_place()}")

    with _Functions(note), _Operators(note):
        yield found


Note = Callable[[str, Iterable[Any]], None]


class _Functions(TorchFunctionMode):
    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(function, "__name__", "") in _READS:
            self._note(function.__name__, args)
        elif getattr(function, "__name__", "") in _COPIES:
            self._note(function.__name__, [torch.empty(0)])
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, note: Note) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in _OPERATORS:
            self._note(name, args)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            if masks:
                self._note(f"{name} by a mask", masks)
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self._note(f"{name} without output_size", args)
        return function(*args, **(kwargs or {}))


def _place() -> str:
    ours = [
        frame
        for frame in traceback.extract_stack()
        if "host_reads" not in frame.filename and "torch/" not in frame.filename
    ]
    return f"{'/'.join(ours[-1].filename.split('/')[-2:])}:{ours[-1].lineno}" if ours else "torch"
