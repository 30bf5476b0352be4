"""Check that replicas of the same tensor part are bitwise equal.

A fault without an ECC error can change one replica of a parameter, and the loss does not show it,
because each rank continues with its own copy. Each set of ranks with replicated tensors computes
one checksum over them and compares it; only if checksums differ are single tensors compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from allometry.optim.shards import Placements
from allometry.parallel.apply import Parallel
from allometry.parallel.mesh import Mesh, local
from allometry.trainer.record.bits import checksum, combined
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.corruption import Response, names_of
from allometry.trainer.record.timing import StepTimer

NAMED = 5
Ranks = tuple[int, ...]
Held = dict[Ranks, dict[str, Tensor]]
"""This rank's part of tensors, by the global ranks with a replica of the same part."""


class Difference(NamedTuple):
    """``ranks`` have other bits of ``tensors`` than the rest of ``of``.

    ``majority``: more than half of ``of`` agree; otherwise the correct replica is unknown.
    """

    ranks: Ranks
    of: Ranks
    tensors: tuple[str, ...]
    majority: bool

    def __str__(self) -> str:
        more = f" and {len(self.tensors) - NAMED} more" if len(self.tensors) > NAMED else ""
        what = ", ".join(self.tensors[:NAMED]) + more
        if not self.majority:
            return f"{names_of(self.of)} hold different bits of {what}, with no majority"
        rest = tuple(rank for rank in self.of if rank not in self.ranks)
        verb = "holds" if len(self.ranks) == 1 else "hold"
        return f"{names_of(self.ranks)} {verb} other bits of {what} than {names_of(rest)}"


def held_alike(parallel: Parallel, optimizer: torch.optim.Optimizer, mesh: Mesh) -> Held:
    """Return the parameters, buffers and optimizer states of which other ranks have replicas.

    Excluded are states in offload tiers, which have their own checksums, and a tied head apart from
    its embedding, which is overwritten in every step.
    """
    places = Placements(mesh)
    first = mesh.pp.rank * mesh.stage.size
    everyone = tuple(range(first, first + mesh.stage.size))
    held: Held = {}

    def add(ranks: Ranks, name: str, tensor: Tensor) -> None:
        if len(ranks) > 1 and tensor.numel():
            held.setdefault(ranks, {})[name] = local(tensor.detach())

    for name, parameter in parallel.named_parameters():
        placed = places.of(parameter)
        box = placed.boxes[mesh.stage.rank]
        if not box.numel:
            continue
        ranks = tuple(first + rank for rank in placed.holders[box])
        add(ranks, name, parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                add(ranks, f"optimizer.{name}.{key}", value)
    for name, buffer in parallel.named_buffers():
        add(everyone, name, buffer)
    return held


def differences(held: Held, mesh: Mesh) -> list[Difference]:
    """Compare replicas; every rank calls this and gets the same result."""
    sums = [
        combined([checksum(tensor) for _, tensor in sorted(each.items())], mesh.device)
        for each in held.values()
    ]
    mine = torch.stack(sums).tolist() if sums else []
    wrong = _deviating(mesh.gather_objects(dict(zip(held, mine, strict=True))))
    if not wrong:
        return []
    each = {
        (ranks, name): int(checksum(tensor))
        for ranks, tensors in held.items()
        if ranks in wrong
        for name, tensor in tensors.items()
    }
    by_name = _deviating(mesh.gather_objects(each))
    found: dict[tuple[Ranks, Ranks, bool], list[str]] = {}
    for (of, name), (ranks, majority) in by_name.items():
        found.setdefault((ranks, of, majority), []).append(name)
    return [
        Difference(ranks, of, tuple(sorted(names)), majority)
        for (ranks, of, majority), names in found.items()
    ]


def _deviating(gathered: list[dict]) -> dict:  # type: ignore[type-arg]
    """Return, for each key with different sums, the deviating ranks and whether most agree."""
    by_key: dict[object, dict[int, int]] = {}
    for rank, sums in enumerate(gathered):
        for key, value in sums.items():
            by_key.setdefault(key, {})[rank] = value
    found = {}
    for key, values in by_key.items():
        (usual, count), *others = Counter(values.values()).most_common()
        if others:
            majority = 2 * count > len(values)
            found[key] = (
                tuple(r for r, value in values.items() if value != usual or not majority),
                majority,
            )
    return found


class Replicas(Callback):
    """Compares replicas every ``every_steps`` and before each checkpoint; runs on every rank.

    ``held`` returns this rank's replicated tensors (``held_alike``); ``saving`` returns True for
    steps followed by a checkpoint. A comparison synchronizes with the device.
    """

    def __init__(
        self,
        every_steps: int,
        held: Callable[[], Mapping[Ranks, dict[str, Tensor]]],
        saving: Callable[[int], bool],
        mesh: Mesh,
        timer: StepTimer,
        response: Response,
    ) -> None:
        self._every, self._held, self._saving = every_steps, held, saving
        self._mesh, self._timer, self._response = mesh, timer, response

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        if not (last or step % self._every == 0 or self._saving(step)):
            return
        with self._timer.paused():
            found = differences(dict(self._held()), self._mesh)
        if not found:
            return
        listed: Iterator[dict[str, object]] = (
            {**one._asdict(), "tensors": one.tensors[:NAMED]} for one in found
        )
        said = "; ".join(map(str, found[:NAMED]))
        self._response.found("replicas_differ", step, said, found=list(listed))
