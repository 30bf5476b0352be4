"""Optimizer states in FP8 (``dre.py``), sharded like their parameters.

A state of a parameter with two dimensions or more is three tensors: ``KEY.q`` of the parameter's
shape, and ``KEY.scale`` and ``KEY.exponent`` with one number for each group. All three have the
placements of the parameter, so checkpoints can change layout without another rounding. Parameters
with one dimension keep fp32 states, since they are small.

If columns are sharded over c ranks into parts that are not multiples of 128, groups end with the
parts. Scales and exponents are then called ``KEY.scale.cutC``: a layout with other groups does not
find its own names in such a checkpoint, and the states are rounded again
(``trainer/state/states.py``).
"""

# R local rows, C local columns, G groups in a row, M logical matrices (see matrix_ops.py)

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from allometry.optim import dre
from allometry.optim.adam import adam_direction
from allometry.optim.dre import GROUP, Dither, Encoded, Table, num_groups
from allometry.parallel.mesh import local

Tensors = dict[str, Tensor]
"""States of one parameter by name."""


KEYS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""States that may be stored in FP8."""


@dataclass(frozen=True)
class Groups:
    """Division of a parameter's rows into groups: ``columns`` are divided into ``cuts`` equal
    parts, and each part into groups of 128, the last of which may be shorter.

    For example, ``Groups(300, 1)`` has 3 groups, and column 130 is in group 1.
    """

    columns: int
    cuts: int

    @classmethod
    def of(cls, parameter: Tensor) -> Groups:
        """Return the groups of a parameter's states in its layout."""
        columns, cuts = parameter.shape[-1], 1
        for size, _ in _column_shards(parameter):
            cuts *= size
        assert columns % cuts == 0, (parameter.shape, cuts)
        return cls(columns, 1 if columns // cuts % GROUP == 0 else cuts)

    @classmethod
    def named(cls, parameter: Tensor, key: str, names: Collection[str]) -> Groups:
        """Return the groups given by the tensor names of a saved state."""
        whole = f"{key}.scale"
        (suffix,) = (name.removeprefix(whole) for name in names if name.startswith(whole))
        return cls(parameter.shape[-1], int(suffix.removeprefix(".cut") or 1))

    @property
    def number(self) -> int:
        """Number of groups in an unsharded row."""
        return self.cuts * num_groups(self.columns // self.cuts)

    @property
    def suffix(self) -> str:
        """Suffix of the names of scales and exponents."""
        return "" if self.cuts == 1 else f".cut{self.cuts}"

    def index(self, columns: Tensor) -> Tensor:
        """Return the group of each column."""
        width = self.columns // self.cuts
        return columns // width * num_groups(width) + columns % width // GROUP


def _column_shards(parameter: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (ranks, mesh dimension) of each mesh dimension that shards the columns."""
    if isinstance(parameter, DTensor):
        for dim, placement in enumerate(parameter.placements):
            if not isinstance(placement, Replicate) and _dim(placement) == parameter.dim() - 1:
                yield parameter.device_mesh.size(dim), dim


def _dim(placement: Placement) -> int:
    dim: int = placement.dim  # type: ignore[attr-defined]  # of Shard, and of FSDP's own kind
    return dim


def beside(parameter: Tensor, part: Tensor, columns: int, *, whole_columns: bool = False) -> Tensor:
    """Return ``part`` as a tensor with the parameter's placements and ``columns`` global columns.

    ``whole_columns``: columns are replicated on every rank.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape = (*parameter.shape[:-1], columns)
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    placements = list(parameter.placements)
    if whole_columns:
        for _, dim in _column_shards(parameter):
            placements[dim] = Replicate()
    return DTensor.from_local(
        *(part, parameter.device_mesh, placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def first_place(parameter: Tensor) -> tuple[int, ...]:
    """Return the global offset of this rank's part of the parameter."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim()
    with unset_fake_temporarily():
        _, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
    return tuple(offset)


def names(key: str, suffix: str = "") -> tuple[str, str, str]:
    """Return the names of q, scale and exponent of the state ``key``.

    >>> names("exp_avg")
    ('exp_avg.q', 'exp_avg.scale', 'exp_avg.exponent')
    """
    return f"{key}.q", f"{key}.scale{suffix}", f"{key}.exponent{suffix}"


def zeros(parameter: Tensor, key: str, groups: Groups) -> Tensors:
    """Return the three tensors of a zero state.

    With the groups of another layout, scales and exponents have all columns on every rank.
    """
    mine = groups == Groups.of(parameter)
    part = local(parameter)
    q, scale, exponent = Encoded.zeros(tuple(part.shape), part.device)
    if not mine:
        shape = (*part.shape[:-1], groups.number)
        scale, exponent = scale.new_zeros(shape), exponent.new_zeros(shape)
    q_name, *others = names(key, groups.suffix)
    made = {q_name: beside(parameter, q, parameter.shape[-1])}
    for name, each in zip(others, (scale, exponent), strict=True):
        made[name] = beside(parameter, each, groups.number, whole_columns=not mine)
    return made


def values_of(parameter: Tensor, tensors: Tensors, key: str, groups: Groups) -> Tensor:
    """Return this rank's part of a state with any groups (as laid out by ``zeros``), fp32."""
    part = Encoded(*(local(tensors[name]) for name in names(key, groups.suffix)))
    table = Table.on(part.q.device)
    if groups == Groups.of(parameter):
        return dre.decode(part, table)
    columns = torch.arange(part.q.shape[-1], device=part.q.device) + first_place(parameter)[-1]
    group_C = groups.index(columns)
    codes = part.q.view(torch.uint8)
    sizes = table.values[part.exponent.long()[..., group_C], (codes & 127).long()]
    x = sizes * part.scale[..., group_C]
    return torch.where(codes > 127, -x, x)


def encoded(parameter: Tensor, key: str, groups: Groups, values: Tensor) -> Tensors:
    """Return the tensors of a state with the local fp32 ``values``."""
    made = zeros(parameter, key, groups)
    part = Encoded(*(local(made[name]) for name in names(key, groups.suffix)))
    dre.encode(values.contiguous(), part, Table.on(part.q.device))
    return made


@dataclass
class Fp8States:
    """FP8 states of one optimizer: rounding mode and rounding statistics.

    ``rounding`` "stochastic" depends on ``seed``, the names of parameter and state, the step number
    and the position of an element, so it is the same in every layout. ``watched``: if it is a dict,
    each update stores the sums ``SEEN`` by parameter and state, fp64 [len(SEEN)].
    """

    rounding: Literal["nearest", "stochastic"]
    seed: int
    watched: dict[tuple[Tensor, str], Tensor] | None = None
    _tables: dict[torch.device, Table] = field(default_factory=dict)
    _places: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)

    @property
    def stochastic(self) -> bool:
        """True if rounding is stochastic, which requires the step count ``step``."""
        return self.rounding == "stochastic"

    @staticmethod
    def holds(parameter: Tensor) -> bool:
        """Return True if the states of a parameter are stored in FP8 (two dimensions or more)."""
        return parameter.dim() >= 2

    def init(self, parameter: Tensor, state: Tensors, *keys: str) -> None:
        """Create missing states as zeros, and ``step`` for stochastic rounding."""
        groups = Groups.of(parameter)
        for key in keys:
            if names(key)[0] not in state:
                state.update(zeros(parameter, key, groups))
        if self.stochastic and "step" not in state:
            state["step"] = torch.tensor(0.0, device="cpu")

    def read(self, parameter: Tensor, state: Tensors, key: str) -> Tensor:
        """Return this rank's part of a state as a new fp32 tensor."""
        part = self._part(parameter, state, key)
        kernels = kernels_for(part.q)
        return (kernels or dre).decode(part, self._table(part.q.device))  # type: ignore[no-any-return]

    def write(self, name: str, parameter: Tensor, state: Tensors, key: str, values: Tensor) -> None:
        """Round this rank's fp32 part of a state and store it."""
        part = self._part(parameter, state, key)
        table, dither = self._table(part.q.device), self._dither(name, parameter, state, key)
        kernels = kernels_for(part.q)
        if kernels is not None:
            watch = self.watched is not None
            seen = kernels.encode(values.contiguous(), part, table, dither, watch=watch)
        else:
            seen = dre.encode(values.contiguous(), part, table, dither)
        self._watch(parameter, key, seen, part)

    def adamw(
        self, name: str, parameter: Tensor, gradient: Tensor, state: Tensors, group: dict[str, Any]
    ) -> None:
        """Run AdamW's step on this rank's part in place; ``step`` already counts this step.

        Processes some rows at a time, or uses one kernel, so no moment is stored in fp32 as a full
        tensor.
        """
        p, keys = local(parameter.detach()), ("exp_avg", "exp_avg_sq")
        mean, square = (self._part(parameter, state, key) for key in keys)
        table, step = self._table(p.device), int(state["step"].item())
        dithers = [self._dither(name, parameter, state, key) for key in keys]
        kernels = kernels_for(mean.q)
        if kernels is not None and p.dtype is torch.float32 and p.is_contiguous():
            settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            seen = kernels.adamw(
                *(p, gradient.contiguous(), mean, square, table),
                **settings,
                step=step,
                dithers=dithers,
                watch=self.watched is not None,
            )
        else:
            seen = _adamw(p, gradient, mean, square, table, dithers, step, group)
        for key, each, part in zip(keys, seen, (mean, square), strict=True):
            self._watch(parameter, key, each, part)

    def _part(self, parameter: Tensor, state: Tensors, key: str) -> Encoded:
        return Encoded(*(local(state[n]) for n in names(key, Groups.of(parameter).suffix)))

    def _table(self, device: torch.device) -> Table:
        if device not in self._tables:
            self._tables[device] = Table.on(device)
        return self._tables[device]

    def _dither(self, name: str, parameter: Tensor, state: Tensors, key: str) -> Dither | None:
        if not self.stochastic:
            return None
        step = int(state["step"].item())
        digest = hashlib.sha256(f"states|{self.seed}|{name}|{key}|{step}".encode()).digest()
        keys = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
        if parameter not in self._places:
            part, place = local(parameter), first_place(parameter)
            row = torch.arange(part.shape[-2], device=part.device) + place[-2]
            if part.dim() == 3:
                matrix = torch.arange(part.shape[0], device=part.device) + place[0]
                row = (matrix[:, None] * parameter.shape[-2] + row).flatten()
            self._places[parameter] = row, place[-1]
        return Dither(keys, *self._places[parameter])

    def _watch(self, parameter: Tensor, key: str, seen: Tensor | None, part: Encoded) -> None:
        if self.watched is None:
            return
        sums = torch.zeros(len(SEEN), dtype=torch.float64, device=part.q.device)
        if seen is not None and part.q.numel():
            error_RG, square_RG, lost_RG, most_RG = seen.double().unbind(2)
            finite_RG = part.scale.isfinite().view(square_RG.shape)
            some_RG = (square_RG > 0.0) & finite_RG
            relative = torch.where(some_RG, error_RG / square_RG.clamp(min=1e-300), 0.0)
            lost_RG, most_RG = (torch.where(finite_RG, x, 0.0) for x in (lost_RG, most_RG))
            bad = (~finite_RG).sum().double()
            sums += torch.stack([relative.sum(), some_RG.sum(), lost_RG.sum(), most_RG.sum(), bad])
        self.watched[parameter, key] = sums


def _adamw(
    p: Tensor,
    gradient: Tensor,
    mean: Encoded,
    square: Encoded,
    table: Table,
    dithers: Sequence[Dither | None],
    step: int,
    group: Mapping[str, Any],
) -> tuple[Tensor | None, ...]:
    """Plain twin of ``dre_triton.adamw``, some rows at a time."""
    lr, decay = group["lr"], group["weight_decay"]
    p_RC = p.view(-1, p.shape[-1]) if p.numel() else p
    g_RC = gradient.reshape(p_RC.shape)
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    for (rows, m), (_, v) in zip(mean.rows(), square.rows(), strict=True):
        moments = dre.decode_rows(m, table), dre.decode_rows(v, table)
        g = g_RC[rows].to(torch.float32)
        direction = adam_direction(g, *moments, step, group["betas"], group["eps"])
        p_RC[rows].mul_(1.0 - lr * decay).add_(direction, alpha=-lr)
        for x, to, dither, into in zip(moments, (m, v), dithers, sums, strict=True):
            into.append(dre.encode_rows(x, to, table, rows, dither))
    return tuple(torch.cat(each) if each else None for each in sums)


SEEN = ("relative_squares", "groups", "underflowed", "saturated", "not_finite")
"""Sums of one update: relative squared errors over groups with nonzero values; number of these
groups; values that became zero; values with the largest code; groups that are not finite.
"""


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """Return the Triton kernels if they can run on this tensor; None: use the plain twin."""
    if not tensor.is_cuda or not _has_triton():
        return None
    from allometry.optim import dre_triton

    return dre_triton


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
