"""Saved-tensor hooks for the results that selective checkpointing saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def with_saved_tensor_hooks(make_contexts: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Apply the active saved-tensor hooks to the results that selective checkpointing saves.

    ``make_contexts`` is a ``context_fn`` of ``torch.utils.checkpoint`` built by
    ``create_selective_checkpoint_contexts``, whose results bypass autograd's saved tensors. Without
    active hooks, and for the compiler, which saves all results itself, the contexts are unchanged.
    """
    caching, cached = make_contexts()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return (caching if hooks is None else _through_hooks(caching, *hooks)), cached


@contextmanager
def _through_hooks(
    caching: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> Iterator[None]:
    with caching:
        yield
    for results in caching.storage.values():
        # Keyed by number; a list before torch 2.13.
        for number in list(results) if isinstance(results, dict) else range(len(results)):
            results[number] = tree_map_only(
                _is_kept, lambda kept: _Result(kept, pack, unpack), results[number]
            )


def _is_kept(entry: Any) -> bool:
    return hasattr(entry, "get_val") and isinstance(entry.val, Tensor)


class _Result:
    """Saved result of one operator, with the interface of torch's own entry."""

    def __init__(
        self, kept: Any, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
    ) -> None:
        self._saved, self._unpack = pack(kept.val), unpack

    def get_val(self, _: bool) -> Tensor:
        """Return the result; the method name is torch's."""
        return self._unpack(self._saved)
