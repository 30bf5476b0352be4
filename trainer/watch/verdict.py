"""Find the ranks that block the others from the last heartbeat of each rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from allometry.trainer.watch.board import Beat
from allometry.trainer.watch.place import Place


@dataclass(frozen=True)
class Report:
    """Last known state of a rank.

    ``beat`` is None before the first heartbeat; ``silent`` is True once heartbeats have stopped.
    ``fate``: state of a silent process according to its host ("died"), if known.
    """

    beat: Beat | None
    silent: bool = False
    fate: str | None = None

    @property
    def answers(self) -> bool:
        """True if the rank still sends heartbeats."""
        return self.beat is not None and not self.silent and self.beat.ended is None

    @property
    def waits(self) -> bool:
        """True if the rank reports that it waits for a message."""
        return self.answers and self.beat is not None and self.beat.place.wait is not None

    @property
    def lost(self) -> bool:
        """True if the rank's process has died, is stopped, or has ended."""
        gone = self.silent and self.fate in ("died", "is stopped")
        return gone or (self.beat is not None and self.beat.ended is not None)


@dataclass(frozen=True)
class Verdict:
    """The late ranks, and the message in which the ``waiting`` ranks wait for them.

    ``late`` is empty if all ranks are in the same message, which then does not complete.
    ``waited_s``: the longest wait; ``place``: of the first waiting rank, or of the late rank if no
    rank waits. ``ranks``: last activity of each rank.
    """

    late: tuple[int, ...]
    waiting: tuple[int, ...]
    waited_s: float
    place: Place
    sentence: str
    ranks: Mapping[int, str]

    def facts(self) -> dict[str, Any]:
        """Return the verdict as JSON for events.jsonl."""
        found: dict[str, Any] = {"late": list(self.late), "waiting": list(self.waiting)}
        found |= {"waited_s": round(self.waited_s, 1), "said": self.sentence}
        wait = self.place.wait
        if wait is not None:
            found |= {"operation": wait.operation, "axis": wait.axis}
        for key in ("phase", "step", "micro_batch", "unit", "work"):
            if (value := getattr(self.place, key)) is not None:
                found[key] = value
        same: dict[str, list[int]] = defaultdict(list)
        for rank, did in self.ranks.items():
            same[did].append(rank)
        found["ranks"] = [{"ranks": numbers(ranks), "did": did} for did, ranks in same.items()]
        return found


def judge(reports: Mapping[int, Report]) -> Verdict:
    """Return the verdict, given that at least one rank has waited for too long.

    A rank waits for the members of its message's group that are not in the same message. A rank
    that others wait for, directly or through other ranks, and that itself waits for no rank, is
    late. For example, if rank 0 waits for rank 1 and rank 1 for rank 2, which computes, rank 2 is
    late.
    """
    reports = dict(sorted(reports.items()))
    edges = {rank: _awaited(rank, reports) for rank in reports}
    stuck = [rank for rank, report in reports.items() if report.waits and edges[rank]]
    late = sorted({end for rank in stuck for end in _ends(rank, edges)})
    if not late and stuck:  # a cycle of waiting ranks: select those that are furthest behind
        late = _behind(stuck, reports)
    if not late and not any(report.waits for report in reports.values()):
        late = _longest(reports)
    waiting = [rank for rank in stuck if set(late) & edges[rank]] if late else _waiting(reports)
    first = min(waiting, key=lambda r: _progress(reports[r]), default=late[0] if late else 0)
    beat = reports[first].beat
    waited_s = max((_stuck_s(reports[rank]) for rank in waiting or late), default=0.0)
    place = beat.place if beat is not None else Place(phase="start")
    if place.work is None and late:
        place = _with_work(place, [reports[rank] for rank in late])
    did = {rank: describe(report) for rank, report in reports.items()}
    verdict = Verdict(tuple(late), tuple(waiting), waited_s, place, "", did)
    return replace(verdict, sentence=_sentence(verdict))


def _awaited(rank: int, reports: Mapping[int, Report]) -> set[int]:
    """Return the ranks that ``rank`` waits for."""
    report = reports[rank]
    if not report.waits or report.beat is None or report.beat.place.wait is None:
        return set()
    wait = report.beat.place.wait
    if wait.peer is not None:
        return {wait.peer} & set(reports)
    members = set(wait.ranks or reports) & set(reports)
    there = {member for member in members if _same(reports[member], report)}
    return members - there - {rank}


def _same(one: Report, other: Report) -> bool:
    """Return True if two ranks are in the same message."""
    if not (one.waits and other.waits) or one.beat is None or other.beat is None:
        return False
    first, second = one.beat.place.wait, other.beat.place.wait
    if first is None or second is None or first.peer is not None or second.peer is not None:
        return False
    keys = [(wait.axis, set(wait.ranks), wait.operation) for wait in (first, second)]
    return keys[0] == keys[1] and first.number == second.number


def _ends(rank: int, edges: Mapping[int, set[int]]) -> set[int]:
    """Return the ranks that block ``rank``, directly or indirectly, and wait for no rank."""
    seen, todo = {rank}, [rank]
    while todo:
        for other in edges[todo.pop()] - seen:
            seen.add(other)
            todo.append(other)
    return {other for other in seen - {rank} if not edges[other]}


def _progress(report: Report) -> tuple[int, int, int]:
    place = report.beat.place if report.beat is not None else Place(phase="start")
    number = place.wait.number if place.wait is not None else None
    return (place.step or 0, place.micro_batch or 0, number or 0)


def _behind(ranks: Sequence[int], reports: Mapping[int, Report]) -> list[int]:
    """Return the ranks that are behind the others; empty if all have made equal progress."""
    done = {rank: _progress(reports[rank]) for rank in ranks}
    least = min(done.values())
    return [rank for rank in ranks if done[rank] == least and max(done.values()) > least]


def _longest(reports: Mapping[int, Report]) -> list[int]:
    """Return the silent ranks, else the ranks that have been at their place the longest."""
    silent = [rank for rank, report in reports.items() if not report.answers]
    if silent:
        return silent
    most = max(_stuck_s(report) for report in reports.values())
    return [rank for rank, report in reports.items() if _stuck_s(report) >= most - 1.0]


def _waiting(reports: Mapping[int, Report]) -> list[int]:
    return [rank for rank, report in reports.items() if report.waits]


def _stuck_s(report: Report) -> float:
    return report.beat.stuck_s if report.beat is not None else 0.0


def _with_work(place: Place, late: Iterable[Report]) -> Place:
    """Return ``place`` with the work of the late ranks, if others wait for that work."""
    work = (r.beat.place.work for r in late if r.beat is not None and r.beat.place.busy)
    return replace(place, work=next(work, None))


def describe(report: Report) -> str:
    """Describe a rank's last activity in words."""
    beat = report.beat
    if beat is None:
        return "has not come: it has sent no heartbeat since the start"
    if beat.ended is not None:
        return f"has ended ({beat.ended or 'its work was done'})"
    at = where(beat.place)
    if report.silent:
        fate = report.fate or "sends no heartbeats"
        return f"{fate} ({beat.process}); it was last seen {at}"
    wait = beat.place.wait
    if wait is None:
        return f"has been {at}"
    peer = "" if wait.peer is None else f" with rank {wait.peer}"
    return f"waits in {wait.operation}{peer} over {wait.axis} {at}"


def where(place: Place) -> str:
    """Describe a place in words."""
    parts = [f"in the {place.phase}" if place.phase != "step" else f"in step {place.step}"]
    if place.phase != "step" and place.step is not None:
        parts[0] += f" of step {place.step}" if place.phase == "checkpoint" else ""
    if place.micro_batch is not None:
        parts.append(f"micro-batch {place.micro_batch}")
    if place.unit is not None:
        parts.append(f"unit {place.unit}")
    if place.work is not None:
        parts.append(f"{'at' if place.busy else 'while others are at'} {place.work!r}")
    if place.where:
        parts.append(place.where)
    return ", ".join(parts)


def numbers(ranks: Sequence[int]) -> str:
    """Return ranks as ``0-3,7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _sentence(verdict: Verdict) -> str:
    wait, waited = verdict.place.wait, f"{verdict.waited_s:.0f} s"
    message = "" if wait is None else f"in {wait.operation} over {wait.axis} "
    if not verdict.late:
        return (
            f"ranks {numbers(verdict.waiting)} have waited {waited} {message}"
            f"({where(verdict.place)}) and all have come: the network or a device does not answer"
        )
    by_did: dict[str, list[int]] = defaultdict(list)
    for rank in verdict.late:
        by_did[verdict.ranks[rank]].append(rank)
    said = "; ".join(f"rank {numbers(ranks)} {did}" for did, ranks in by_did.items())
    if not verdict.waiting:
        return f"{said}, and has been there for {waited}"
    return (
        f"{said}; rank {numbers(verdict.waiting)} has waited {waited} for it {message}"
        f"({where(verdict.place)})"
    )
