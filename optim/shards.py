"""Shards of all ranks for each parameter, computed identically on every rank without messages.

For any combination of ZeRO, tensor, expert and hybrid sharding, each rank of a pipeline stage has
one box of a parameter. The box may be empty, and may be the same as on other ranks, its replicas.
"""

# W ranks of a stage, M logical matrices of a parameter (see matrix_ops.py)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# A private function, with one signature from torch 2.11 to 2.13: the public function next to it
# returns only the shard of the calling rank. The result is checked against the local shards.
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from allometry.parallel.mesh import Mesh

Range = tuple[int, int]  # start, stop


@dataclass(frozen=True, slots=True)
class Box:
    """Part of a parameter viewed as [M, out, in]; missing dimensions are leading ones."""

    matrices: Range
    rows: Range
    columns: Range

    @property
    def numel(self) -> int:
        """Number of elements."""
        ranges = (self.matrices, self.rows, self.columns)
        return math.prod(stop - start for start, stop in ranges)

    def of_matrix(self, index: int) -> Box:
        """Return the part of the box in one matrix."""
        return Box((index, index + 1), self.rows, self.columns)


@dataclass(frozen=True)
class Placed:
    """One parameter: its size as [M, out, in], and the box of each of the W ranks."""

    size: tuple[int, int, int]
    boxes: tuple[Box, ...]

    @cached_property
    def holders(self) -> dict[Box, tuple[int, ...]]:
        """Ranks of each box in ascending order; empty boxes are omitted."""
        holders: dict[Box, list[int]] = {}
        for rank, box in enumerate(self.boxes):
            if box.numel:
                holders.setdefault(box, []).append(rank)
        return {box: tuple(ranks) for box, ranks in holders.items()}

    @cached_property
    def parts(self) -> tuple[tuple[tuple[Box, tuple[int, ...]], ...], ...]:
        """Boxes of each logical matrix, with their ranks."""
        parts: list[list[tuple[Box, tuple[int, ...]]]] = [[] for _ in range(self.size[0])]
        for box, ranks in self.holders.items():
            for index in range(*box.matrices):
                parts[index].append((box.of_matrix(index), ranks))
        return tuple(map(tuple, parts))

    @cached_property
    def whole_everywhere(self) -> bool:
        """True if the parameter is replicated on every rank."""
        return len(self.holders) == 1 and len(next(iter(self.holders.values()))) == len(self.boxes)


class Placements:
    """Shards of the parameters of a pipeline stage on all ranks of ``mesh.stage``."""

    def __init__(self, mesh: Mesh) -> None:
        self._rank = mesh.stage.rank
        # tp is innermost and pp outermost, so the ranks of a stage are consecutive.
        first = mesh.pp.rank * mesh.stage.size
        ranks = range(first, first + mesh.stage.size)
        self._places = [
            _place(rank, mesh.expert_mesh) | _place(rank, mesh.device_mesh) for rank in ranks
        ]
        self._known: dict[object, Placed] = {}

    def of(self, parameter: Tensor) -> Placed:
        """Return the shards of a parameter: replicated for plain tensors, else from its DTensor."""
        if not isinstance(parameter, DTensor):
            if parameter.shape not in self._known:
                box = _box(parameter.shape, (0,) * parameter.dim())
                whole = Placed(_size(parameter.shape), (box,) * len(self._places))
                self._known[parameter.shape] = whole
            return self._known[parameter.shape]
        mesh, placements = parameter.device_mesh, parameter.placements
        key = (parameter.shape, mesh, placements)
        if key not in self._known:
            names = mesh.mesh_dim_names
            assert names is not None, mesh
            boxes = []
            # In a dry run tensors are fake, but these tensors need values.
            with unset_fake_temporarily():
                for place in self._places:
                    shape, offset = _compute_local_shape_and_global_offset(
                        parameter.shape, mesh.shape, [place[name] for name in names], placements
                    )
                    boxes.append(_box(shape, offset))
            mine = boxes[self._rank]
            assert mine.numel == parameter.to_local().numel(), (parameter.shape, placements, mine)
            self._known[key] = Placed(_size(parameter.shape), tuple(boxes))
        return self._known[key]


def _place(rank: int, mesh: DeviceMesh) -> dict[str, int]:
    """Return the coordinates of a rank in a mesh of all ranks in order."""
    names = mesh.mesh_dim_names
    assert names is not None
    coordinates = {}
    for name, size in zip(reversed(names), reversed(mesh.shape), strict=True):
        rank, coordinates[name] = divmod(rank, size)
    return coordinates


def _size(shape: Sequence[int]) -> tuple[int, int, int]:
    assert len(shape) <= 3, shape
    matrices, rows, columns = (1,) * (3 - len(shape)) + tuple(shape)
    return matrices, rows, columns


def _box(shape: Sequence[int], offset: Sequence[int]) -> Box:
    missing = 3 - len(shape)
    starts = (0,) * missing + tuple(offset)
    stops = [start + n for start, n in zip(starts, (1,) * missing + tuple(shape), strict=True)]
    matrices, rows, columns = zip(starts, stops, strict=True)
    return Box(matrices, rows, columns)
