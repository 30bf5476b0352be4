"""Messages between ranks while a plan runs, matched by order alone as in NCCL.

NCCL communicators have no tags: between two ranks, the first message is received by the first
receive, whatever both are meant for. A communicator also runs one operation at a time: an operation
of a rank starts after the rank's earlier operations on the communicator have completed, and
completes when its peers have reached the matching operation. (Messages posted together are one
operation.) Messages that may be in flight at the same time, such as messages of rings and of
pipelines, therefore use different communicators or are posted in one order on both sides. ``match``
simulates lists of messages under these rules; ``programs_of`` builds the lists from a plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from allometry.parallel.hdp.orders import Action, Orders, ring_pass
from allometry.scaling.hdp.check import PlanError
from allometry.scaling.hdp.plan import Plan

Rank = tuple[int, int]
"""Pair (hdp rank, pipeline rank)."""


class Message(NamedTuple):
    """One side of a message. Both sides must use the same ``name``, which is not transmitted."""

    way: Literal["send", "receive"]
    peer: Rank
    name: Hashable


@dataclass(frozen=True, eq=False)
class Post:
    """Messages that a rank posts together on a communicator."""

    communicator: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Wait:
    """Wait of the rank until ``post`` has completed."""

    post: Post


Step = Post | Wait
Programs = Mapping[Rank, Sequence[Step]]


def match(programs: Programs, blocking: Collection[str] = ()) -> int:
    """Simulate the messages; return the number of received messages.

    On communicators in ``blocking`` a rank waits for each post immediately, as NCCL does when two
    ranks communicate for the first time. For example, ``match(programs_of(plan, orders))``.

    Raises:
        PlanError: a message would be received in place of another, or ranks deadlock.
    """
    played = {
        rank: [s for step in steps for s in _played(step, blocking)]
        for rank, steps in programs.items()
    }
    return _Match(played).run()


def _played(step: Step, blocking: Collection[str]) -> tuple[Step, ...]:
    waits = isinstance(step, Post) and step.communicator in blocking
    return (step, Wait(step)) if isinstance(step, Post) and waits else (step,)


@dataclass(eq=False)
class _Open:
    """A post in progress: unmatched message names by peer."""

    post: Post
    left: int
    sends: dict[Rank, deque[Hashable]] = field(default_factory=dict)
    receives: dict[Rank, deque[Hashable]] = field(default_factory=dict)


class _Match:
    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.at = dict.fromkeys(programs, 0)
        self.queues: dict[tuple[str, Rank], deque[_Open]] = {}
        self.done: set[Post] = set()
        self.ready: deque[Rank] = deque(programs)
        self.received = 0

    def run(self) -> int:
        while self.ready:
            self._go_on(self.ready.popleft())
        stuck = [rank for rank, steps in self.programs.items() if self.at[rank] < len(steps)]
        left = [key for key, queue in self.queues.items() if queue]
        if stuck or left:
            raise PlanError(self._why(left))
        return self.received

    def _go_on(self, rank: Rank) -> None:
        """Run the program of a rank up to a wait for an incomplete post."""
        steps = self.programs[rank]
        while self.at[rank] < len(steps):
            step = steps[self.at[rank]]
            if isinstance(step, Wait):
                if step.post not in self.done:
                    return
            else:
                self._post(rank, step)
            self.at[rank] += 1

    def _post(self, rank: Rank, post: Post) -> None:
        opened = _Open(post, len(post.messages))
        for way, peer, name in post.messages:
            lists = opened.sends if way == "send" else opened.receives
            lists.setdefault(peer, deque()).append(name)
        queue = self.queues.setdefault((post.communicator, rank), deque())
        queue.append(opened)
        if len(queue) == 1:
            self._begin(rank, post.communicator)

    def _begin(self, rank: Rank, communicator: str) -> None:
        """Match the first post of a queue with the first posts of its peers' queues."""
        queue = self.queues[communicator, rank]
        while queue:
            first = queue[0]
            for peer in {message.peer for message in first.post.messages}:
                others = self.queues.get((communicator, peer))
                if others:
                    self._meet(rank, first, peer, others[0])
                    self._meet(peer, others[0], rank, first)
                    if others[0].left == 0 and others[0] is not first:
                        self._end(peer, others)
                        self._begin(peer, communicator)
                if first.left == 0:
                    break
            if not queue or queue[0] is not first:
                return  # a peer that advanced has completed it
            if first.left:
                return
            self._end(rank, queue)

    def _meet(self, sender: Rank, sent: _Open, receiver: Rank, received: _Open) -> None:
        names, wanted = sent.sends.get(receiver), received.receives.get(sender)
        while names and wanted:
            name, want = names.popleft(), wanted.popleft()
            if name != want:
                raise PlanError(
                    f"on communicator {sent.post.communicator} rank {receiver} takes {name} of "
                    f"rank {sender} for {want}"
                )
            sent.left -= 1
            received.left -= 1
            self.received += 1

    def _end(self, rank: Rank, queue: deque[_Open]) -> None:
        self.done.add(queue.popleft().post)
        self.ready.append(rank)

    def _why(self, left: Sequence[tuple[str, Rank]]) -> str:
        communicator, rank = left[0]
        way, peer, name = self.queues[communicator, rank][0].post.messages[0]
        verb = "send" if way == "send" else "receive"
        return (
            f"messages never end: rank {rank} waits to {verb} {name} "
            f"{'to' if way == 'send' else 'from'} rank {peer} on communicator {communicator}"
        )


def programs_of(
    plan: Plan,
    orders: Callable[[int], Orders],
    *,
    layers: int = 1,
    communicators: Mapping[str, str] | None = None,
) -> dict[Rank, list[Step]]:
    """Return the posts and waits of every rank in one step of a plan.

    ``orders`` as in ``replay``; ``layers`` is the number of attention layers of a stage.
    ``communicators`` maps "ring" and "pipeline" to communicator names; None: "hdp" and "pp". For
    example, ``orders`` is ``lambda count: schedule_orders("1f1b", 2, 1, count)``.
    """
    names = communicators or {"ring": "hdp", "pipeline": "pp"}
    programs: dict[Rank, list[Step]] = {}
    for rank, order in enumerate(plan.orders):
        if not order:
            continue
        made = orders(len(order))
        for pp, events in enumerate(_with_messages(made)):
            steps: list[Step] = []
            sent: list[Post] = []
            coming: dict[_Handed, Post] = {}
            for event in events:
                if isinstance(event, Action):
                    for handed in _inputs(event):
                        if handed in coming:
                            steps.append(Wait(coming.pop(handed)))
                    steps += _ring_steps(
                        plan, order[event.micro_batch], rank, pp, event, layers, names
                    )
                else:
                    way, handed, peer = event
                    post = Post(names["pipeline"], (Message(way, (rank, peer), handed),))
                    steps.append(post)
                    if way == "send":
                        sent.append(post)
                    else:
                        coming[handed] = post
            programs[rank, pp] = [*steps, *map(Wait, sent)]
    return programs


class _Handed(NamedTuple):
    """Tensor sent between stages: an activation (F) or a gradient (G) of a micro-batch."""

    kind: Literal["F", "G"]
    stage: int  # the stage that computed it
    micro_batch: int


class _Sent(NamedTuple):
    way: Literal["send", "receive"]
    handed: _Handed
    peer: int  # pipeline rank


def _inputs(action: Action) -> Iterator[_Handed]:
    if action.kind == "F":
        yield _Handed("F", action.stage - 1, action.micro_batch)
    elif action.kind in "BI":
        yield _Handed("G", action.stage + 1, action.micro_batch)


def _with_messages(orders: Orders) -> list[list[Action | _Sent]]:
    """Insert messages between the passes of a pipeline as torch's schedules do.

    A receive is inserted at the receiver's current position when the peer sends. All messages thus
    have one global order, and each rank posts its messages in this order.
    """
    of_stage = {action.stage: rank for rank, actions in enumerate(orders) for action in actions}
    last = max(of_stage)
    lists: list[list[Action | _Sent]] = [[] for _ in orders]
    at, there = [0] * len(orders), set[_Handed]()
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(orders):
            if at[rank] == len(actions):
                continue
            action = actions[at[rank]]
            needed = [need for need in _inputs(action) if 0 <= need.stage <= last]
            if not there.issuperset(needed):
                continue
            moved = True
            at[rank] += 1
            lists[rank].append(action)
            step = {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
            to = action.stage + step
            if step == 0 or not 0 <= to <= last:
                continue
            handed = _Handed("F" if step == 1 else "G", action.stage, action.micro_batch)
            there.add(handed)
            peer = of_stage[to]
            if peer != rank:
                lists[rank].append(_Sent("send", handed, peer))
                lists[peer].append(_Sent("receive", handed, rank))
    assert all(a == len(actions) for a, actions in zip(at, orders, strict=True)), "orders never end"
    return lists


def _ring_steps(
    plan: Plan,
    number: int | None,
    rank: int,
    pp: int,
    action: Action,
    layers: int,
    names: Mapping[str, str],
) -> list[Step]:
    """Return the ring messages of one pass of a unit, hop by hop as in ``ring.py``."""
    ring = () if number is None else plan.units[number].ring
    passed = ring_pass(action)
    if number is None or len(ring) == 1 or passed is None:
        return []
    member, size = ring.index(rank), len(ring)
    after, before = (ring[(member + way) % size] for way in (1, -1))

    def hop(layer: int, kind: str, step: int) -> Post:
        # A tensor sent at step s was first sent by the member s places before.
        source = (member - step) % size
        common = (number, action.stage, passed, layer, kind)
        return Post(
            names["ring"],
            (
                Message("send", (after, pp), (*common, source)),
                Message("receive", (before, pp), (*common, (source - 1) % size)),
            ),
        )

    steps: list[Step] = []
    for layer in range(layers) if passed == "F" else reversed(range(layers)):
        homeward = None
        for step in range(size):
            keys = hop(layer, "keys", step) if step < size - 1 else None
            if keys is not None:
                steps.append(keys)
            if homeward is not None:
                steps.append(Wait(homeward))
            if passed == "G" and step > 0:
                homeward = hop(layer, "gradients", step)
                steps.append(homeward)
            if keys is not None:
                steps.append(Wait(keys))
        if homeward is not None:
            steps.append(Wait(homeward))
    return steps
