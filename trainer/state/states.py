"""Loading optimizer states that a checkpoint keeps otherwise than this run: fp32, FP8, or FP8 whose
groups end elsewhere because another layout cut the columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from allometry.configs.errors import UserError
from allometry.optim import fp8_states
from allometry.optim.build import settle
from allometry.optim.deepspeed import DeepSpeedOptimizer
from allometry.optim.fp8_states import KEYS, Groups
from allometry.parallel.mesh import Mesh, local
from allometry.trainer.state import checkpoint


def load(
    path: Path,
    state: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    mesh: Mesh,
) -> dict[str, int]:
    """Fill the tensors of ``state`` in place: all of a run, those of ``optimizer`` among them.

    ``names`` are those of parameters. Every rank calls this. What the checkpoint keeps in the same
    way is filled bit by bit; other states are read as they are there and rounded to the nearest.

    Returns:
        How many states were converted, by "from -> to"; the same on all ranks of a stage.
    """
    there = FileSystemReader(path).read_metadata().state_dict_metadata
    wanted, converted = dict(state), Counter[str]()
    others = list(_others(optimizer, names, there))
    for other in others:
        for name in other.held:
            wanted.pop(f"{other.prefix}{name}", None)
        wanted |= {f"{other.prefix}{name}": tensor for name, tensor in other.read.items()}
        converted[f"{_text(other.saved)} -> {_text(other.kept)}"] += 1
    for parameter, held in optimizer.state.items():
        count = f"optimizer.{names[parameter]}.step"
        if "step" in held and count not in there:  # rounding at random begins to count
            wanted.pop(count, None)
    if isinstance(optimizer, DeepSpeedOptimizer):
        _check_plain(path, wanted, there)
    checkpoint.load(path, wanted, mesh)
    settle(optimizer)
    for other in others:
        other.convert()
    return dict(converted)


def _check_plain(path: Path, wanted: Collection[str], there: Collection[str]) -> None:
    """Refuse states in FP8, which only the other engine converts."""
    absent = next((name for name in wanted if name not in there), None)
    if absent is not None and any(name.startswith(f"{absent}.") for name in there):
        raise UserError(
            f"checkpoint {path} keeps {absent} in FP8, which parallel.zero.engine=deepspeed cannot "
            "read; use parallel.zero.engine: fsdp2, whose checkpoints both engines read"
        )


class _Other(NamedTuple):
    """A state of one parameter that is kept otherwise; groups None: in fp32."""

    parameter: Tensor
    key: str
    prefix: str
    saved: Groups | None
    kept: Groups | None
    held: dict[str, Tensor]  # the optimizer's own tensors of this state, by their names
    read: dict[str, Tensor]  # what the checkpoint fills

    @torch.no_grad()
    def convert(self) -> None:
        if self.saved is None:
            values = local(self.read[self.key]).float()
        else:
            values = fp8_states.values_of(self.parameter, self.read, self.key, self.saved)
        if self.kept is None:
            local(self.held[self.key]).copy_(values)
        else:
            fp8_states.write_values(self.held, self.key, self.kept, values)


def _others(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], there: Collection[str]
) -> Iterator[_Other]:
    by_prefix: dict[str, list[str]] = {f"optimizer.{name}.": [] for name in names.values()}
    for name in there:
        for end in (i for i, letter in enumerate(name) if letter == "."):
            if name[: end + 1] in by_prefix:
                by_prefix[name[: end + 1]].append(name[end + 1 :])
    for parameter, held in optimizer.state.items():
        prefix = f"optimizer.{names[parameter]}."
        for key in KEYS:
            mine = {n: t for n, t in held.items() if n == key or n.startswith(f"{key}.")}
            theirs = [n for n in by_prefix[prefix] if n == key or n.startswith(f"{key}.")]
            if not mine or not theirs or mine.keys() == set(theirs):
                continue
            kept = None if key in mine else Groups.of(parameter)
            saved = None if key in theirs else Groups.named(parameter, key, theirs)
            if saved is None:
                read = {key: torch.zeros_like(parameter)}
            else:
                read = fp8_states.zeros(parameter, key, saved)
            yield _Other(parameter, key, prefix, saved, kept, mine, read)


def _text(groups: Groups | None) -> str:
    if groups is None:
        return "fp32"
    return "fp8" if groups.cuts == 1 else f"fp8 of columns in {groups.cuts} parts"
