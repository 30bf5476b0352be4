"""Find a complete set of local copies from which a launch can continue."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from allometry.configs.errors import UserError
from allometry.laws.runs import read_lines
from allometry.parallel.agree import from_main_rank, on_all_ranks, with_heartbeat
from allometry.parallel.mesh import Mesh
from allometry.trainer.state.checkpoint import read_facts
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.identity import stranger
from allometry.trainer.state.integrity import damage
from allometry.trainer.state.local import COPY, LocalCopies
from allometry.trainer.state.transfer import Parcel, files_of


class _Seen(NamedTuple):
    """A copy on the node of rank ``by``, complete according to its file sizes."""

    owner: int
    step: int
    launch: str
    by: int
    path: str
    is_own: bool  # False for a replica


@dataclass(frozen=True)
class Offer:
    """A verified set of copies: ``facts`` as in a checkpoint, ``given`` by owner.

    ``unused``: newer copies, with the reason why their set is incomplete.
    """

    step: int
    facts: dict[str, Any]
    given: tuple[_Seen, ...]
    unused: tuple[str, ...] = ()

    @property
    def from_others(self) -> list[int]:
        """Ranks whose own copy is missing or damaged and whose replica is used."""
        return [seen.owner for seen in self.given if not seen.is_own]


@dataclass(frozen=True)
class Offered:
    """Result of the search: the newest complete set, if any, and why newer copies are unusable."""

    offer: Offer | None
    unused: tuple[str, ...]


def launch_name(folder: RunFolder) -> str:
    """Return the name by which the copies of the newest launch in run.json are identified."""
    return _named(folder.recorded()["launches"][-1]["time"], folder)


def _named(time: float, folder: RunFolder) -> str:
    """Identify a launch by its start time, its config and its rewinds."""
    files = (folder.config, folder.rewinds)
    texts = [path.read_bytes() for path in files if path.exists()]
    return f"{time}/{hashlib.sha256(bytes(1).join(texts)).hexdigest()[:16]}"


def find(local: LocalCopies, folder: RunFolder, total_steps: int, record_every: int) -> Offered:
    """Find the newest complete set of copies, without writing files; every rank calls this.

    A set is valid if a launch of this run with the current config.yaml wrote it, if no later launch
    began at or before its step, and if metrics.jsonl has the rows up to its step.
    """
    mesh = local.mesh
    listed, problems = with_heartbeat(
        mesh, lambda: _listed(local, folder), "looking for local copies"
    )
    answers = mesh.gather_objects((listed, problems))
    seen = [each for found, _ in answers for each in found]
    unused = [problem for _, told in answers for problem in told]
    keys = {(each.step, each.launch) for each in seen}
    refused = from_main_rank(
        mesh,
        lambda: _refused(folder, keys, total_steps, record_every),
        "looking at the launches of the run",
    )
    sets: dict[tuple[int, str], list[_Seen]] = defaultdict(list)
    for each in seen:
        sets[each.step, each.launch].append(each)
    for key in sorted(sets, reverse=True):
        step = key[0]
        if key in refused:
            unused.append(f"step {step}: {refused[key]}")
            continue
        given = _whole(sets[key], mesh, unused)
        if given is not None:
            facts = None
            if given[0].by == mesh.rank:
                facts = read_facts(Path(given[0].path))
                del facts[COPY]
            facts = mesh.broadcast_object(facts, source=given[0].by)
            assert facts is not None
            return Offered(Offer(step, facts, given, tuple(dict.fromkeys(unused))), ())
    return Offered(None, tuple(dict.fromkeys(unused)))


def _listed(local: LocalCopies, folder: RunFolder) -> tuple[list[_Seen], list[str]]:
    """Return the run's copies on this node in this layout, and the problems of other copies."""
    found, problems = list[_Seen](), list[str]()
    try:
        if not local.is_ours(local.folder.lstat()):
            return [], [f"{local.folder} is not a folder of this user alone"]
    except OSError:
        return [], []
    for path in sorted(local.folder.glob("rank-*/of-*/step-*")):
        problem = damage(path, contents=False)
        try:
            problem = problem or stranger(folder, path, None)
            if problem is not None:
                raise UserError(problem)
            facts = read_facts(path)
            told = facts[COPY]
            owner, launch, layout = int(told["rank"]), str(told["launch"]), told["layout"]
            if path.parent.name != f"of-{owner}":
                raise UserError(f"it is the copy of rank {owner}")
            if layout != local.key:
                raise UserError("it is of another layout")
        except (UserError, KeyError, TypeError, ValueError) as error:
            keeper = path.parent.parent.name
            problems.append(f"{path.name} of {path.parent.name[3:]} in {keeper}: {error}")
            continue
        is_own = path.parent.parent.name == f"rank-{owner}"
        found.append(_Seen(owner, facts["step"], launch, local.mesh.rank, str(path), is_own))
    return found, problems


def _refused(
    folder: RunFolder, keys: set[tuple[int, str]], total_steps: int, record_every: int
) -> dict[tuple[int, str], str]:
    """Return the sets from which this run cannot continue, with reasons."""
    if not keys or not folder.config.exists():
        return dict.fromkeys(keys, "the run's folder is new")
    try:
        launches = folder.recorded().get("launches", [])
        names = [_named(launch["time"], folder) for launch in launches]
        firsts = [int(launch["first_step"]) for launch in launches]
    except (UserError, KeyError, TypeError):
        return dict.fromkeys(keys, "run.json cannot be read")
    rows = [row["step"] for row in read_lines(folder.metrics)]
    refused = {}
    for step, launch in keys:
        if launch not in names:
            refused[step, launch] = "another run, or another description of it, made it"
        elif any(first <= step for first in firsts[names.index(launch) + 1 :]):
            refused[step, launch] = "the run has gone on from an earlier step since"
        elif step >= total_steps:
            refused[step, launch] = "the run ends before"
        elif step // record_every * record_every > max((r for r in rows if r <= step), default=0):
            refused[step, launch] = f"{folder.metrics.name} lacks rows before it"
    return refused


def _whole(seen: Sequence[_Seen], mesh: Mesh, unused: list[str]) -> tuple[_Seen, ...] | None:
    """Return an undamaged copy of each rank, preferably its own; None if a rank has none.

    Every rank checks the copies that it provides.
    """
    of: Mapping[int, list[_Seen]] = defaultdict(list)
    for each in sorted(seen, key=lambda e: (not e.is_own, e.by != e.owner, e.by)):
        of[each.owner].append(each)
    step = seen[0].step
    checked: set[_Seen] = set()
    while True:
        absent = [rank for rank in range(mesh.world_size) if not of[rank]]
        if absent:
            unused.append(f"step {step}: there is no whole copy of rank(s) {absent}")
            return None
        given = tuple(of[rank][0] for rank in range(mesh.world_size))
        mine = [each for each in given if each.by == mesh.rank and each not in checked]

        def check(mine: list[_Seen] = mine) -> dict[_Seen, str | None]:
            return {each: damage(Path(each.path), contents=True) for each in mine}

        answers = mesh.gather_objects(with_heartbeat(mesh, check, "checking local copies"))
        found = {each: problem for answer in answers for each, problem in answer.items()}
        checked |= found.keys()
        if not any(found.values()):
            return given
        for each, problem in found.items():
            if problem is not None:
                whose = "its own" if each.is_own else "the replica"
                unused.append(f"step {step} of rank {each.owner}, {whose}: {problem}")
                of[each.owner].remove(each)


def fetch(local: LocalCopies, offer: Offer) -> Path:
    """Bring each rank's copy to the rank's own folder; every rank calls this.

    Returns:
        Path of this rank's copy.

    Raises:
        UserError: a copy could not be transferred or written; raised on all ranks.
    """
    mesh = local.mesh
    on_all_ranks(mesh, local.make, "making folders of local copies")
    sizes = mesh.gather_objects(
        {e.owner: files_of(Path(e.path)) for e in offer.given if e.by == mesh.rank}
    )

    def bring() -> list[str]:
        failed = []
        for given in offer.given:
            owner, path = given.owner, Path(given.path)
            if mesh.rank not in (owner, given.by):
                continue
            place = local.copy_of(owner, offer.step)
            reason = None
            if given.by != owner == mesh.rank:
                files = sizes[given.by][owner]
                reason = local.receive(None, owner, offer.step, given.by, files)
            elif given.by != owner:
                local.send(Parcel(owner, path, sizes[mesh.rank][owner]))
            elif path != place:
                reason = _moved(path, place)
            if reason is not None:
                failed.append(f"rank {owner}: {reason}")
        return failed

    answers = mesh.gather_objects(with_heartbeat(mesh, bring, "fetching local copies"))
    failed = [text for answer in answers for text in answer]
    if failed:
        raise UserError(
            f"the local copies of step {offer.step} could not be fetched ({'; '.join(failed)}); "
            f"remove {local.folder} and run again, which goes on from the newest checkpoint"
        )
    return local.copy_of(mesh.rank, offer.step)


def _moved(path: Path, place: Path) -> str | None:
    """Move a copy to its owner's folder; return the reason of a failure, else None."""
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
    except OSError as error:
        return error.strerror
    return None
