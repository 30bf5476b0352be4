"""Saving and loading states that do not lie on the device, one tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from allometry.optim.offload.held import Stored

State = dict[str, Tensor | Stored]
"""What a checkpoint holds, by name."""


def layouts(state: State) -> dict[str, Tensor]:
    """The tensors of ``state``, and for what is stored tensors of its layout."""
    return {
        name: value.like if isinstance(value, Stored) else value for name, value in state.items()
    }


class Saving(DefaultSavePlanner):
    """Reads what is stored when it is written to the checkpoint."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    @override
    def lookup_object(self, index: MetadataIndex) -> object:
        value = self._state.get(index.fqn)
        return value.read() if isinstance(value, Stored) else super().lookup_object(index)


class Loading(DefaultLoadPlanner):
    """Puts what was read from the checkpoint where it is stored, piece by piece."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state
        self._open: dict[str, Tensor] = {}

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self._state.get(index.fqn)
        if not isinstance(value, Stored):
            found: Tensor = super().lookup_tensor(index)
            return found
        self._open[index.fqn] = value.read()
        return self._open[index.fqn]

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        name = read_item.dest_index.fqn
        value = self._state.get(name)
        if isinstance(value, Stored):
            value.write(self._open.pop(name))
