"""Load optimizer states that a checkpoint stores in another format than the run.

Formats are fp32, FP8, and FP8 with other groups because another layout divided the columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.optim import fp8_states
from allometry.optim.delayed import LATE
from allometry.optim.fp8_states import KEYS, Groups
from allometry.optim.offload.held import Stored
from allometry.parallel.deepspeed.boxes import Stretch
from allometry.parallel.mesh import Mesh, local
from allometry.trainer.state import checkpoint
from allometry.trainer.state.planners import State
from allometry.trainer.state.shards import ShardReader

READ_BYTES = 1 << 30
"""Bytes of a rank's states that are read before conversion; a single larger state is allowed."""


class Loaded(NamedTuple):
    """Result of loading.

    ``converted``: number of states by "from -> to", the same on all ranks of a pipeline stage.
    ``begun``: parameters without states in the checkpoint, because they were frozen.
    """

    converted: dict[str, int]
    begun: list[Tensor]


def load(
    path: Path,
    state: State,
    names: Mapping[Tensor, str],
    mesh: Mesh,
    added: frozenset[str] = frozenset(),
) -> Loaded:
    """Load the full state of a run, including optimizer states, into ``state`` in place.

    ``names`` are the parameters' names. Every rank calls this. States in the same format are loaded
    bit for bit; other states are read in their stored format, converted and rounded to nearest, a
    batch at a time, on the device or in an offload tier. Parameters without states in the
    checkpoint keep their initial states, as in a first step. Parameters ``added`` to the model
    since the checkpoint also keep their initial values if the checkpoint has none. For example, 8
    states of an FP8 checkpoint resumed in fp32 give ``converted={"fp8 -> fp32": 8}``.

    Raises:
        UserError: the checkpoint stores states in FP8, and the run uses the DeepSpeed engine.
    """
    there = ShardReader(path).read_metadata().state_dict_metadata
    prefixes = {f"optimizer.{name}.": parameter for parameter, name in names.items()}
    saved, held = (_of_parameters(each, prefixes) for each in (there, state))
    others = list(_others(prefixes, held, saved))
    away = {f"{other.prefix}{name}" for other in others for name in other.held}
    begun = [prefix for prefix in prefixes if held[prefix] and not saved[prefix]]
    away |= {f"{prefix}{name}" for prefix in begun for name in held[prefix]}
    # Stochastic rounding starts its step count, and delayed updates begin.
    delayed = [p for p in prefixes if LATE in held[p] and LATE not in saved[p]]
    away |= {f"{p}{LATE}" for p in delayed}
    away |= {f"model.{name}" for name in added if f"model.{name}" not in there}
    away |= {f"{p}step" for p in prefixes if "step" in held[p] and "step" not in saved[p]}
    checkpoint.load(path, {name: each for name, each in state.items() if name not in away}, mesh)
    for prefix in delayed:
        late, values = held[prefix][LATE], state[f"model.{names[prefixes[prefix]]}"]
        assert isinstance(late, Stored)
        assert isinstance(values, Stored)
        late.write(values.read())
    batches = _batches(others)
    # All ranks read equally often, because each read is a collective.
    for turn in range(max(mesh.gather_objects(len(batches)))):
        batch = batches[turn] if turn < len(batches) else []
        reads = [other.to_read() for other in batch]
        wanted: State = {
            f"{other.prefix}{name}": tensor
            for other, read in zip(batch, reads, strict=True)
            for name, tensor in read.items()
        }
        checkpoint.load(path, wanted, mesh)
        for other, read in zip(batch, reads, strict=True):
            other.convert(read)
    converted = Counter(f"{_text(other.saved)} -> {_text(other.kept)}" for other in others)
    return Loaded(dict(converted), [prefixes[prefix] for prefix in begun])


class _Other(NamedTuple):
    """A state of one parameter in another format; groups are None for fp32."""

    parameter: Tensor
    key: str
    prefix: str
    saved: Groups | None
    kept: Groups | None
    held: State  # the optimizer's tensors of this state, by name

    @property
    def nbytes(self) -> int:
        """Approximate number of bytes that this rank reads."""
        return local(self.parameter).numel() * (4 if self.saved is None else 1)

    def to_read(self) -> dict[str, Tensor]:
        """Return the tensors to be loaded from the checkpoint."""
        if self.saved is None:
            return {self.key: torch.zeros_like(self.parameter)}
        return fp8_states.zeros(self.parameter, self.key, self.saved)

    @torch.no_grad()
    def convert(self, read: dict[str, Tensor]) -> None:
        """Convert the tensors ``read`` and store them in ``held``."""
        if self.saved is None:
            values = local(read[self.key]).float()
        else:
            values = fp8_states.values_of(self.parameter, read, self.key, self.saved)
        made = {self.key: values}
        if self.kept is not None:
            made = fp8_states.encoded(self.parameter, self.key, self.kept, values)
        for name, part in made.items():
            to = self.held[name]
            if isinstance(to, Stored):
                to.write(local(part))
            else:
                local(to).copy_(local(part))


def _others(
    prefixes: Mapping[str, Tensor], held: Mapping[str, State], saved: Mapping[str, State]
) -> Iterator[_Other]:
    for prefix, parameter in prefixes.items():
        for key in KEYS:
            mine, theirs = (
                {n: each for n, each in of[prefix].items() if n == key or n.startswith(f"{key}.")}
                for of in (held, saved)
            )
            if mine and theirs and mine.keys() != theirs.keys():
                if any(isinstance(getattr(each, "like", None), Stretch) for each in mine.values()):
                    raise UserError(
                        f"the checkpoint keeps {prefix}{key} in FP8, which "
                        "parallel.zero.engine=deepspeed cannot read; use parallel.zero.engine: "
                        "fsdp2, whose checkpoints both engines read"
                    )
                kept = None if key in mine else Groups.of(parameter)
                as_saved = None if key in theirs else Groups.named(parameter, key, theirs)
                yield _Other(parameter, key, prefix, as_saved, kept, mine)


def _of_parameters(
    tensors: Mapping[str, Any], prefixes: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Group tensors by the prefix of their names; return the rest of each name."""
    found: dict[str, dict[str, Any]] = {prefix: {} for prefix in prefixes}
    for name, value in tensors.items():
        for end in (i for i, letter in enumerate(name, start=1) if letter == "."):
            if name[:end] in found:
                found[name[:end]][name[end:]] = value
    return found


def _batches(others: Iterable[_Other]) -> list[list[_Other]]:
    """Divide the states, in order, into batches of at most ``READ_BYTES``."""
    batches: list[list[_Other]] = []
    room = 0
    for other in others:
        if not batches or other.nbytes > room:
            batches.append([])
            room = READ_BYTES
        batches[-1].append(other)
        room -= other.nbytes
    return batches


def _text(groups: Groups | None) -> str:
    if groups is None:
        return "fp32"
    return "fp8" if groups.cuts == 1 else f"fp8 of columns in {groups.cuts} parts"
