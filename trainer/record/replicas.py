"""Whether ranks that hold the same part of a tensor hold the same bits of it.

A fault that no ECC sees leaves one replica's parameter otherwise, and nothing in a loss says so:
each rank goes on from its own copy. Ranks add up the bits of what they hold alike, in one number
for each set of ranks, and compare these; only where they differ, tensor by tensor.
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
"""This rank's part of tensors by the ranks that hold the same part, numbered in the whole run."""


class Difference(NamedTuple):
    """``ranks`` hold other bits of ``tensors`` than the rest of ``of``.

    ``majority``: more than half of ``of`` agree; otherwise it is not known who is right.
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
    """Parameters, buffers and states of the optimizer that this rank holds as others do.

    Left out: what lies in tiers, which has checksums of its own, and a tied head away from its
    embedding, which is written anew in every step.
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
    """Compare what ranks hold alike; the same on every rank, and every rank calls this."""
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
    """Of the keys of which ranks have different sums: who deviates, and whether most agree."""
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
    """Compares replicas where that is due and before each checkpoint; it stands on every rank.

    ``held`` says what this rank holds as others do (``held_alike``), ``saving`` which steps get a
    checkpoint. Every ``every_steps`` all work that was asked of the device is waited for.
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
