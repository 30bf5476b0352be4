"""Simulate a plan before it runs: check its rules, detect deadlocks, compute its times.

Members of a ring wait for each other, and a pipeline alternates passes of different micro-batches.
If two ranks enter two rings in different orders, the step deadlocks or, if messages happen to have
the same size, computes wrong gradients. Every plan is therefore checked and replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from allometry.parallel.hdp.orders import Action, Orders, ring_pass
from allometry.scaling.hdp.check import PlanError, check_plan
from allometry.scaling.hdp.cost import CostModel
from allometry.scaling.hdp.plan import Plan

SHARES: Mapping[str, float] = {"F": 1 / 3, "B": 2 / 3, "I": 1 / 3, "W": 1 / 3}
"""Share of a unit's cost by pass: backward is twice as long as forward, with equal halves."""


class Span(NamedTuple):
    """Pass of a rank from ``start`` to ``end`` in seconds; ``unit`` None: a dummy micro-batch."""

    start: float
    end: float
    unit: int | None
    action: Action


@dataclass(frozen=True)
class Replay:
    """Result of a simulation: ``spans[hdp rank][pp rank]`` are the passes of each rank in order."""

    spans: tuple[tuple[tuple[Span, ...], ...], ...]

    @cached_property
    def makespan(self) -> float:
        """Seconds until the last rank has finished."""
        lanes = (lane for pipeline in self.spans for lane in pipeline)
        return max((lane[-1].end for lane in lanes if lane), default=0.0)

    @cached_property
    def busy(self) -> tuple[tuple[float, ...], ...]:
        """Seconds of computation of each rank, by hdp rank and pp rank."""
        return tuple(
            tuple(sum(span.end - span.start for span in lane) for lane in pipeline)
            for pipeline in self.spans
        )

    @property
    def balance(self) -> float:
        """Ratio of the makespan to the mean busy seconds of the ranks; 1 is perfect balance."""
        busy = [seconds for pipeline in self.busy for seconds in pipeline]
        mean = sum(busy) / len(busy)
        return self.makespan / mean if mean > 0 else 1.0


def replay(plan: Plan, orders: Callable[[int], Orders] | None = None) -> Replay:
    """Check and simulate a plan.

    ``orders(count)`` are the actions of a pipeline's ranks for a number of micro-batches
    (``schedule_orders``); None: no pipeline, forward and then backward of each unit. The cost of a
    unit is the sum over all stages, which are assumed equal. All members of a ring start a pass
    together; only the first half of a split backward contains a ring. Time is linear in the number
    of passes. For example, ``replay(plan).makespan`` without a pipeline.

    Raises:
        PlanError: the plan violates a rule (``check_plan``) or deadlocks; the message names the
            waiting ranks.
    """
    check_plan(plan)
    play = _Play(plan, orders or _in_turn)
    play.run()
    return Replay(
        tuple(
            tuple(tuple(lane.spans) for lane in play.lanes[rank * play.pp : (rank + 1) * play.pp])
            for rank in range(plan.ranks)
        )
    )


def summary(plan: Plan, cost: CostModel, played: Replay | None = None) -> dict[str, Any]:
    """Return ``Plan.describe`` with the costs of the plan, as JSON.

    ``balance``: see ``Replay``. ``bytes_sent``: bytes sent in all rings, over the layers that
    ``cost`` counts, by one tp rank.
    """
    played = played or replay(plan)
    sent = [0.0, 0.0]
    for unit in plan.units:
        if len(unit.ring) > 1:
            for i, size in enumerate(cost.ring_bytes(plan.tokens(unit), len(unit.ring))):
                sent[i] += size
    return {
        **plan.describe(),
        "makespan_s": played.makespan,
        "balance": played.balance,
        "bytes_forward": round(sent[0]),
        "bytes_backward": round(sent[1]),
        "bytes_sent": round(sum(sent)),
    }


class _Lane:
    """One rank of one pipeline, and its progress."""

    __slots__ = ("actions", "clock", "rank", "spans", "units")

    def __init__(
        self, rank: int, actions: tuple[Action, ...], units: tuple[int | None, ...]
    ) -> None:
        self.rank, self.actions, self.units = rank, actions, units
        self.clock = 0.0
        self.spans: list[Span] = []

    @property
    def next(self) -> Action:
        return self.actions[len(self.spans)]

    @property
    def place(self) -> str:
        """Current position of this rank as text for error messages."""
        kind, stage, index = self.next
        unit = self.units[index]
        what = "a dummy" if unit is None else f"unit {unit}"
        passes = {"F": "forward", "B": "backward", "I": "backward (I)", "W": "backward (W)"}
        return (
            f"hdp rank {self.rank} at {what} (micro-batch {index}, {passes[kind]} of stage {stage})"
        )


class _Play:
    """State of a simulation: lanes that can advance, completed passes, and waiting lanes."""

    def __init__(self, plan: Plan, orders: Callable[[int], Orders]) -> None:
        made = {count: orders(count) for count in {len(order) for order in plan.orders}}
        self.pp = max(len(ranks) for ranks in made.values())
        stages = 1 + max(action.stage for ranks in made.values() for a in ranks for action in a)
        self.last = stages - 1
        self.units = plan.units
        self.seconds = [
            {kind: share * unit.cost / stages for kind, share in SHARES.items()}
            for unit in plan.units
        ]
        self.lanes = [
            _Lane(rank, actions, order)
            for rank, order in enumerate(plan.orders)
            for actions in made[len(order)]
        ]
        # Keyed by pipeline, pass (F, or G for the gradient), stage and micro-batch.
        self.done: dict[tuple[int, str, int, int], float] = {}
        self.waiting: dict[tuple[int, str, int, int], _Lane] = {}
        self.met: dict[tuple[int, str, int], list[_Lane]] = defaultdict(list)
        self.ready = self.lanes[::-1]

    def run(self) -> None:
        while self.ready:
            lane = self.ready.pop()
            while len(lane.spans) < len(lane.actions):
                if not self._advance(lane):
                    break
        stuck = [lane for lane in self.lanes if len(lane.spans) < len(lane.actions)]
        if stuck:
            raise PlanError(self._why(stuck))

    def _advance(self, lane: _Lane) -> bool:
        """Run a lane's next action if its inputs are complete; else record the missing input."""
        kind, stage, index = action = lane.next
        need: tuple[tuple[int, str, int, int], ...] = ()
        if kind == "F":
            if stage > 0:
                need = ((lane.rank, "F", stage - 1, index),)
        elif kind == "W":
            need = ((lane.rank, "G", stage, index),)
        else:
            need = ((lane.rank, "F", stage, index),)
            if stage < self.last:
                need = (*need, (lane.rank, "G", stage + 1, index))
        for key in need:
            when = self.done.get(key)
            if when is None:
                self.waiting[key] = lane
                return False
            lane.clock = max(lane.clock, when)
        number = lane.units[index]
        ring = () if number is None else self.units[number].ring
        passed = ring_pass(action)
        if number is None or len(ring) == 1 or passed is None:
            self._finish(lane, action, number, lane.clock)
            return True
        members = self.met[number, passed, stage]
        members.append(lane)
        if len(members) < len(ring):
            return False
        start = max(member.clock for member in members)
        for member in members:
            self._finish(member, member.next, number, start)
            if member is not lane:
                self.ready.append(member)
        return True

    def _finish(self, lane: _Lane, action: Action, number: int | None, start: float) -> None:
        kind, stage, index = action
        end = start if number is None else start + self.seconds[number][kind]
        lane.spans.append(Span(start, end, number, action))
        lane.clock = end
        if kind != "W":
            key = (lane.rank, "F" if kind == "F" else "G", stage, index)
            self.done[key] = end
            waiting = self.waiting.pop(key, None)
            if waiting is not None:
                self.ready.append(waiting)

    def _why(self, stuck: list[_Lane]) -> str:
        """Describe the waiting ring and the absent rank; without a ring, the invalid orders."""
        for lane in stuck:
            _, stage, index = lane.next
            number, passed = lane.units[index], ring_pass(lane.next)
            if number is None or passed is None:
                continue
            here = self.met.get((number, passed, stage), [])
            if lane not in here:
                continue
            ring = self.units[number].ring
            absent = [
                other
                for other in stuck
                if other.rank in ring
                and other not in here
                and stage in {action.stage for action in other.actions}
            ]
            return (
                f"the plan never ends: unit {number} has the ring {list(ring)} with {lane.place}, "
                f"but {absent[0].place}"
            )
        return f"the plan never ends: {stuck[0].place} waits for a pass that nobody does before it"


def _in_turn(count: int) -> Orders:
    """Return the order without a pipeline: forward and then backward of each micro-batch."""
    return (tuple(Action(kind, 0, index) for index in range(count) for kind in ("F", "B")),)
