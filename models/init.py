"""Initial values that depend only on seed, parameter name and row, on every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from allometry.models.build import named_parameters, parameter_specs
from allometry.scaling.parameterization import Parameterization

ROWS_AT_ONCE = 256

Distribution = Literal["normal", "uniform"]


@dataclass(frozen=True, slots=True)
class Box:
    """Shard of a tensor of ``shape``: the contiguous box ``local``, starting at ``offset``."""

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


Hold = Callable[[nn.Module, str], AbstractContextManager[Tensor]]
"""(owner, parameter name) -> context manager with the values to fill, unsharded or a shard."""


def held(owner: nn.Module, name: str) -> AbstractContextManager[Tensor]:
    """Return a context manager with the values of a parameter that has storage."""
    return nullcontext(getattr(owner, name).detach())


def initialize(
    module: nn.Module, parameterization: Parameterization, seed: int, hold: Hold = held
) -> None:
    """Fill every parameter of ``module``, sharded or not, as ``parameterization`` specifies.

    Modules with buffers set their first values in ``reset_buffers``.

    Each row (last dimension) of a random parameter is drawn on the CPU by its own generator, seeded
    with (``seed``, full name, row), so the initial model is the same for any number of ranks, any
    sharding and any device. If experts start alike, every expert gets the rows of the first.
    ``hold``: opens the values of one parameter at a time. Raises ``ValueError`` for a parameter
    without a role. For example, ``initialize(model, parameterization, seed=1)``.
    """
    specs = parameter_specs(module)
    for name, owner, own_name, _ in list(named_parameters(module)):
        resolved = parameterization.resolve(specs[name])
        with hold(owner, own_name) as values:
            box = local_box(values)
            match resolved.init_kind:
                case "normal" | "uniform" as kind:
                    fill_random(box, kind, resolved.init_std, name, seed, alike=resolved.alike)
                case "ones":
                    box.local.fill_(1.0)
                case "zeros":
                    box.local.zero_()
    for owner in module.modules():
        reset = getattr(owner, "reset_buffers", None)
        if reset is not None:  # values set in a constructor on the meta device were lost
            reset()


def local_box(tensor: Tensor) -> Box:
    """Return this rank's shard of ``tensor``, a plain tensor or a DTensor.

    Asserts that the shard is one contiguous box, as for every order of shards that FSDP2 and
    tensor parallelism create.
    """
    shape = tuple(tensor.shape)
    if not torch.distributed.is_available():
        return Box(tensor, shape, (0,) * len(shape))
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return Box(tensor, shape, (0,) * len(shape))
    # Private API, but the only function that supports strided shards (FSDP2 over tensor parallel).
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local = tensor.to_local()
    local_shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    assert tuple(local.shape) == tuple(local_shape), (local.shape, local_shape)
    return Box(local, shape, tuple(offset))


def fill_random(
    box: Box, kind: Distribution, std: float, name: str, seed: int, *, alike: bool = False
) -> None:
    """Fill ``box.local`` with its part of the random numbers of the full parameter.

    ``kind``: N(0, ``std``²), or U(-b, b) with the same standard deviation. ``alike``: each matrix
    of a parameter [E, out, in] gets the numbers of the first matrix.
    """
    if box.local.numel() == 0:
        return
    columns = slice(box.offset[-1], box.offset[-1] + box.local.shape[-1])
    rows = list(_rows(box))
    local_2d = box.local.view(len(rows), box.local.shape[-1])
    if alike:
        assert len(box.shape) == 3, (name, box.shape)
        rows = [row % box.shape[1] for row in rows]
    scale = std if kind == "normal" else std * math.sqrt(3.0)

    def fill(start: int) -> None:
        some = rows[start : start + ROWS_AT_ONCE]
        drawn = draw_rows(some, box.shape[-1], name, seed, kind)
        local_2d[start : start + len(some)].copy_(drawn[:, columns].double() * scale)

    # Drawing releases the GIL, so threads share the work of large matrices.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, len(rows), ROWS_AT_ONCE)))


def draw_rows(
    rows: list[int], width: int, name: str, seed: int, kind: Distribution = "normal"
) -> Tensor:
    """Return random numbers [len(rows), ``width``], each row from its own generator.

    N(0, 1) in fp64, because torch's fp32 normal differs between instruction sets while fp64
    rounded to fp32 does not; U(-1, 1) in fp32, which is equal on all. Always full contiguous rows,
    because torch's algorithm depends on length and strides.
    """
    generator = torch.Generator("cpu")
    dtype = torch.float64 if kind == "normal" else torch.float32
    drawn = torch.empty(len(rows), width, dtype=dtype, device="cpu")
    for row, into in zip(rows, drawn, strict=True):
        digest = hashlib.sha256(f"{seed}|{name}|{row}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if kind == "normal":
            into.normal_(generator=generator)
        else:
            into.uniform_(-1.0, 1.0, generator=generator)
    return drawn


def _rows(box: Box) -> Iterator[int]:
    """Yield the unsharded number of each local row, all dimensions but the last flattened."""
    leading, sizes = box.shape[:-1], box.local.shape[:-1]
    for local in range(math.prod(sizes)):
        row, stride = 0, 1
        for whole, size, start in zip(
            reversed(leading), reversed(sizes), reversed(box.offset[:-1]), strict=True
        ):
            local, index = divmod(local, size)
            row += (start + index) * stride
            stride *= whole
        yield row
