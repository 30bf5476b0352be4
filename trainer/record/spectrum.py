"""Compute the largest singular value of each matrix by power iteration on shards."""

# M logical matrices of a parameter (1, or its experts), R rows, C columns; m, r, c of them here

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from allometry.optim.shards import Box, Placements
from allometry.parallel.mesh import Mesh, local

FIRST_ITERATIONS = 32
ITERATIONS = 4
"""Iterations of the first call and of later calls, which continue from the last vectors."""


@dataclass(frozen=True)
class _Matrix:
    """A parameter as [M, R, C]: the part that this rank adds to sums, and the global sizes."""

    parameter: Tensor
    size: tuple[int, int, int]
    box: Box | None


class TopSingularValues:
    """Tracks the largest singular value of each logical matrix of some parameters.

    An iteration multiplies each rank's part by two vectors and sums the products over the ranks of
    the stage: no matrix is gathered, and the value is the same in every layout up to rounding. ``‖W
    v‖`` of a unit vector v is a lower bound of the largest singular value that converges to it; v
    is kept between calls, so that a slowly changing value is tracked closely. The initial vectors
    depend on the parameter's name alone and are not saved: a resume starts from them again.
    Parameters are only read, and the run's random generators are not used. ``values`` returns this
    rank's part of a parameter.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, Tensor]],
        mesh: Mesh,
        values: Callable[[Tensor], Tensor] = lambda parameter: local(parameter.detach()),
    ) -> None:
        self._values = values
        self._stage, self._device = mesh.stage, mesh.device
        self.names = [name for name, _ in named]
        placements = Placements(mesh)
        self._matrices = []
        self._vectors: list[Tensor] = []  # v, [M, C] in fp32
        for name, parameter in named:
            assert parameter.dim() in (2, 3), (name, parameter.shape)
            placed = placements.of(parameter)
            mine = placed.boxes[self._stage.rank]
            # Of the ranks with replicas of a part only one adds it to the sums.
            adds = bool(mine.numel) and placed.holders[mine][0] == self._stage.rank
            self._matrices.append(_Matrix(parameter, placed.size, mine if adds else None))
            self._vectors.append(_start(name, placed.size).to(self._device))
        self._begun = False

    @torch.no_grad()
    def __call__(self) -> dict[str, Tensor]:
        """Return the values by parameter, [M] in fp32; every rank of the stage calls this."""
        values: list[Tensor] = []
        for _ in range(ITERATIONS if self._begun else FIRST_ITERATIONS):
            u_MR = self._products(self._vectors, transposed=False)
            values = [u.norm(dim=1) for u in u_MR]
            v_MC = self._products(u_MR, transposed=True)
            # A matrix of zeros keeps its vector.
            self._vectors = [
                torch.where(n > 0, v / n.clamp(min=torch.finfo(v.dtype).tiny), old)
                for v, old in zip(v_MC, self._vectors, strict=True)
                for n in (v.norm(dim=1, keepdim=True),)
            ]
        self._begun = True
        return dict(zip(self.names, values, strict=True))

    def _products(self, vectors: list[Tensor], *, transposed: bool) -> list[Tensor]:
        """Return W v [M, R] for all matrices, or with ``transposed`` Wᵀ u [M, C]."""
        made = []
        for matrix, vector in zip(self._matrices, vectors, strict=True):
            M, R, C = matrix.size
            into = torch.zeros(M, C if transposed else R, device=self._device)
            box = matrix.box
            if box is not None:
                here, there = slice(*box.rows), slice(*box.columns)
                if transposed:
                    here, there = there, here
                m = slice(*box.matrices)
                part = self._values(matrix.parameter)
                part = part if part.dim() == 3 else part[None]  # [m, r, c]
                factor = vector[m, there].to(device=part.device, dtype=part.dtype)
                product = torch.bmm(part.mT if transposed else part, factor[:, :, None])
                into[m, here] = product[:, :, 0].to(into)
            made.append(into)
        if self._stage.size > 1 and made:
            flat = torch.cat([each.flatten() for each in made])
            dist.all_reduce(flat, group=self._stage.group)
            pieces = flat.split([each.numel() for each in made])
            made = [piece.view_as(each) for piece, each in zip(pieces, made, strict=True)]
        return made


def _start(name: str, size: tuple[int, int, int]) -> Tensor:
    """Return unit vectors [M, C] that depend on the name alone."""
    generator = torch.Generator("cpu")
    digest = hashlib.sha256(f"singular|{name}".encode()).digest()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    v_MC = torch.randn(size[0], size[2], generator=generator, dtype=torch.float64, device="cpu")
    return (v_MC / v_MC.norm(dim=1, keepdim=True)).float()
