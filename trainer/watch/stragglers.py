"""Detect stragglers: ranks that spend less time waiting in collectives than their peers.

All ranks end a step together, so their step times are equal; a slow rank is identified by its lack
of waiting. The watchdog samples how often the training thread waits for a message; the remaining
share is a rank's computation. Samples describe the host, and are therefore taken on CPU ranks only:
a GPU's host runs ahead of the device.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Row
from allometry.trainer.watch.board import Beat

SAMPLES = 150
"""Samples of each rank in steps before ranks are compared; a share is then known to 4 %."""
CERTAIN = 4.0
"""Minimum difference of two shares in standard deviations; smaller ones may be random."""


@dataclass(frozen=True)
class Slowest:
    """Slowest rank of a window: it computes ``percent`` longer than the median of its peers."""

    rank: int
    percent: float
    certain: bool


@dataclass
class Stragglers:
    """Compares ranks in successive windows; a rank slow in two consecutive windows is reported.

    ``percent``: threshold by which a straggler's computation exceeds the median of its peers.
    ``events``: events not yet reported. For example, a rank that waits in 50 % of its samples while
    its peers wait in 60 % computes 25 % longer.
    """

    percent: float
    slowest: Slowest | None = None
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    _before: dict[int, Beat] = field(default_factory=dict)
    _suspects: dict[int, int] = field(default_factory=dict)  # first slow step, by rank
    _said: set[int] = field(default_factory=set)

    def see(self, beats: Mapping[int, Beat]) -> None:
        """Process the newest heartbeats of all ranks."""
        if not self._before or self._before.keys() != beats.keys():
            self._before = dict(beats)
            return
        counts = {r: beat.samples - self._before[r].samples for r, beat in beats.items()}
        if min(counts.values()) < SAMPLES:
            return
        busy = {
            rank: 1.0 - (beat.waiting - self._before[rank].waiting) / counts[rank]
            for rank, beat in beats.items()
        }
        by_stage: dict[int, list[int]] = defaultdict(list)
        for rank, beat in beats.items():
            by_stage[beat.stage].append(rank)
        found = {
            rank: self._compare(rank, peers, busy, counts[rank])
            for peers in by_stage.values()
            if len(peers) > 1
            for rank in peers
        }
        self.slowest = max(found.values(), key=lambda one: one.percent, default=None)
        for rank, one in found.items():
            self._note(one, rank, beats[rank], self._before[rank])
        self._before = dict(beats)

    def _compare(
        self, rank: int, peers: list[int], busy: Mapping[int, float], count: int
    ) -> Slowest:
        typical = max(statistics.median(busy[peer] for peer in peers if peer != rank), 1.0 / count)
        spread = math.sqrt((busy[rank] * (1 - busy[rank]) + typical * (1 - typical)) / count)
        certain = busy[rank] - typical > CERTAIN * spread
        return Slowest(rank, round(100 * (busy[rank] / typical - 1), 1), certain)

    def _note(self, one: Slowest, rank: int, now: Beat, before: Beat) -> None:
        slow = one.certain and one.percent >= self.percent
        step = before.place.step
        if slow and rank in self._suspects and rank not in self._said:
            self._said.add(rank)
            facts = {"rank": rank, "percent": one.percent, "since_step": self._suspects[rank]}
            host = {"step": now.place.step, "host": now.process.host, "step_s": now.seconds}
            self.events.append(("straggler", {**facts, **host}))
        elif slow:
            self._suspects.setdefault(rank, step or 1)
        else:
            self._suspects.pop(rank, None)
            if rank in self._said:
                self._said.discard(rank)
                ended: dict[str, Any] = {"rank": rank, "step": now.place.step}
                self.events.append(("straggler_ended", ended))


class RankTimes(Callback):
    """Reports stragglers and adds ``ranks/`` to rows; stores each step's seconds in ``note``."""

    def __init__(self, stragglers: Stragglers | None, note: Any, report: Reporter) -> None:
        self._stragglers, self._note, self._report = stragglers, note, report

    @override
    def additions(self, finished: FinishedStep) -> Row:
        self._note.seconds = round(finished.seconds, 4)
        slowest = None if self._stragglers is None else self._stragglers.slowest
        if slowest is None or not finished.recorded:
            return {}
        return {"ranks/slowest": slowest.rank, "ranks/slowest_percent": slowest.percent}

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        events = self._stragglers.events if self._stragglers is not None else []
        while events:
            kind, facts = events.pop(0)
            self._report(kind, **facts)
