"""Save and load states that are not in device memory, one tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from typing_extensions import override

from allometry.optim.offload.held import Stored
from allometry.parallel.deepspeed.boxes import Stretch

State = dict[str, Tensor | Stored]
"""Contents of a checkpoint, by name."""


def layouts(state: State) -> dict[str, Tensor | Stretch]:
    """Return the tensors of ``state``, with the layout in place of a ``Stored`` tensor."""
    return {
        name: value.like if isinstance(value, Stored) else value for name, value in state.items()
    }


def _box(value: Stored, data: Tensor, index: MetadataIndex) -> Tensor:
    """Return the box of a ``Stored`` tensor at ``index``: a part of a stretch, or all its data."""
    like = value.like
    return like.within(data, index.offset) if isinstance(like, Stretch) else data


class Saving(DefaultSavePlanner):
    """Reads a ``Stored`` tensor from its tier when it is written to the checkpoint."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    @override
    def lookup_object(self, index: MetadataIndex) -> object:
        value = self._state.get(index.fqn)
        if not isinstance(value, Stored):
            return super().lookup_object(index)
        return _box(value, value.read(), index)


class Loading(DefaultLoadPlanner):
    """Writes each ``Stored`` tensor read from the checkpoint to its tier."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state
        self._open: dict[str, Tensor] = {}

    @override
    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # torch replaces values that are neither tensors nor plain values by None.
        stretches = {k: v for k, v in state_dict.items() if isinstance(v, Stretch)}
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self.state_dict |= stretches

    @override
    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self._state.get(index.fqn)
        if not isinstance(value, Stored):
            found: Tensor = super().lookup_tensor(index)
            return found
        self._open[index.fqn] = value.read()
        return _box(value, self._open[index.fqn], index)

    @override
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        name = read_item.dest_index.fqn
        value = self._state.get(name)
        if isinstance(value, Stored):
            value.write(self._open.pop(name))
