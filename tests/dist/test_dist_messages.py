"""Messages posted by ranks in a step, without tags, under the rules of an NCCL communicator.

Unlike NCCL, gloo matches messages by tags and runs several operations at once. The test removes the
tags, so that gloo matches by order, records all posts of all ranks, and replays them with
``match``, in which a communicator runs one operation after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

from allometry.configs.run import RunConfig
from allometry.parallel.hdp.messages import Message, Post, Step, Wait, match
from allometry.scaling.hdp.check import PlanError
from test_dist_pipeline_hdp import assert_equal_to_one_process, config, errors

RunRanks = Callable[..., list[Any]]
Recorded = list[tuple[Any, ...]]
"""("post", number, group, ((way, peer), ...)) and ("wait", number), as plain tuples."""


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record this rank's posts and waits, and remove tags."""
    events: Recorded = []
    works: list[Any] = []  # kept alive, so that ids are unique
    numbers: dict[int, int] = {}
    batch: list[tuple[str, int]] | None = None

    def note(group: Any, way: str, peer: int, work: Any) -> None:
        works.append(work)
        other = dist.get_global_rank(group, peer)
        if batch is None:
            numbers[id(work)] = len(works)
            events.append(("post", len(works), group.group_name, ((way, other),)))
        else:
            batch.append((way, other))

    group_class, work_class = dist.ProcessGroup, dist.Work
    send, recv, wait = group_class.send, group_class.recv, work_class.wait
    batched = dist.batch_isend_irecv

    def noted_send(self: Any, tensors: Any, peer: int, tag: int) -> Any:
        work = send(self, tensors, peer, 0)
        note(self, "send", peer, work)
        return work

    def noted_recv(self: Any, tensors: Any, peer: int, tag: int) -> Any:
        work = recv(self, tensors, peer, 0)
        note(self, "receive", peer, work)
        return work

    def noted_wait(self: Any, *args: Any) -> Any:
        if id(self) in numbers:
            event = ("wait", numbers[id(self)])
            if event not in events[-4:]:
                events.append(event)
        return wait(self, *args)

    def noted_batch(operations: list[dist.P2POp]) -> list[dist.Work]:
        nonlocal batch
        batch, number = [], len(works) + 1
        made = batched(operations)
        numbers.update({id(work): number for work in made})
        group = operations[0].group
        assert group is not None
        events.append(("post", number, group.group_name, tuple(batch)))
        batch = None
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_class, "send", noted_send)
        patch.setattr(group_class, "recv", noted_recv)
        patch.setattr(work_class, "wait", noted_wait)
        patch.setattr(dist, "batch_isend_irecv", noted_batch)
        yield events


def recorded_errors(
    run: RunConfig, steps: Any, held_out: int = 0
) -> tuple[dict[str, float], Recorded]:
    with recording() as events:
        return errors(run, steps, held_out), events


def programs(of_ranks: list[Recorded]) -> Mapping[tuple[int, int], list[Step]]:
    """Convert the records for ``match``; a message is identified by its index between two ranks."""
    made: dict[tuple[int, int], list[Step]] = {}
    for rank, events in enumerate(of_ranks):
        posts: dict[int, Post] = {}
        seen: dict[tuple[Any, ...], int] = {}
        steps: list[Step] = []
        for kind, number, *rest in events:
            if kind == "wait":
                steps.append(Wait(posts[number]))
                continue
            group, sides = rest
            messages = []
            for way, peer in sides:
                count = seen[group, way, peer] = seen.get((group, way, peer), -1) + 1
                messages.append(Message(way, (peer, 0), count))
            posts[number] = Post(group, tuple(messages))
            steps.append(posts[number])
        made[rank, 0] = steps
    return made


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv_zero_bubble"])
def test_order_alone_tells_messages_apart(run_ranks: RunRanks, schedule: str) -> None:
    run = config(schedule, tied=True, zero=1)
    results = run_ranks(recorded_errors, 4, run, [((8, 18), (0, 1, 4, 7))], 5)
    assert_equal_to_one_process([errors for errors, _ in results])
    played = programs([events for _, events in results])
    kinds = {
        step.communicator for steps in played.values() for step in steps if isinstance(step, Post)
    }
    assert len(kinds) == 4, "two pipelines, and two groups of ranks whose rings meet"
    assert match(played) > 100
    # The control: on one rank, two messages to the same peer in reversed order.
    steps = played[0, 0]
    posts = [i for i, step in enumerate(steps) if isinstance(step, Post)]
    first, second = next(
        (i, k) for n, i in enumerate(posts) for k in posts[n + 1 :] if alike(steps[i], steps[k])
    )
    swapped = [*steps]
    swapped[first], swapped[second] = steps[second], steps[first]
    with pytest.raises(PlanError):
        match({**played, (0, 0): swapped})


def alike(one: Step, other: Step) -> bool:
    assert isinstance(one, Post)
    assert isinstance(other, Post)
    sides = [[(m.way, m.peer) for m in post.messages] for post in (one, other)]
    return one.communicator == other.communicator and sides[0] == sides[1]
