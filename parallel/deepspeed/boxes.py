"""Split a contiguous range of a tensor's elements into boxes, the unit of checkpoint files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Box(NamedTuple):
    """Box of a tensor whose elements are contiguous in memory, beginning at element ``start``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of the elements [start, stop), in order: at most 2 * dims - 1 boxes.

    For example, elements [1, 6) of shape (3, 3) are the boxes (0, 1:3) and (1, 0:3).
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape), start)
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # full slices of the first dimension
    if first > last:  # inside one slice
        yield from _within(shape, first - 1, start, stop)
        return
    yield from _within(shape, first - 1, start, first * inner)
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        yield Box((first, *zeros), (last - first, *shape[1:]), first * inner)
    yield from _within(shape, last, last * inner, stop)


def _within(shape: Sequence[int], index: int, start: int, stop: int) -> Iterator[Box]:
    base = index * math.prod(shape[1:])
    for box in boxes(shape[1:], start - base, stop - base):
        yield Box((index, *box.offsets), (1, *box.sizes), box.start + base)


@dataclass(frozen=True)
class Stretch:
    """Checkpoint protocol of torch for a tensor of which this rank has [start, stop).

    A stretch takes the place of the tensor in a state dict and has no memory of its own.
    """

    shape: tuple[int, ...]
    start: int
    stop: int

    def size(self) -> torch.Size:
        """Return the shape of the unsharded tensor."""
        return torch.Size(self.shape)

    def within(self, flat: Tensor, offsets: Sequence[int] | None) -> Tensor:
        """Return a view of this rank's part ``flat``: the box at ``offsets``."""
        for box in boxes(self.shape, self.start, self.stop):
            if tuple(offsets or ()) == box.offsets:
                begin = box.start - self.start
                return flat[begin : begin + math.prod(box.sizes)].view(box.sizes)
        raise AssertionError((self, offsets))

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
            for box in boxes(self.shape, self.start, self.stop)
        ]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(torch.empty(0))
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]
