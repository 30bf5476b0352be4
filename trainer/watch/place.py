"""Locate a rank's work from the frames of its threads, without recording anything in a step.

``sys._current_frames()`` returns the frame of every Python thread. Frames of allometry give the
phase, the step, the micro-batch and the unit; the process group in a frame's variables, or torch's
flight recorder, gives the ranks of a message. Each look takes about 0.1 ms of the interpreter, in
the watching thread.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from allometry.parallel.groups import AXES
from allometry.parallel.in_two import InTwo
from allometry.parallel.mesh import Axis, Mesh
from allometry.trainer.watch import frames
from allometry.trainer.watch.flights import Flight

START, STEP, EVALUATION, CHECKPOINT, END = "start", "step", "evaluation", "checkpoint", "end"
# Axes with the same ranks share a group; the sending module determines the axis.
_MEANT = {
    "parallel.expert": "ep",
    "parallel.tensor": "tp",
    "parallel.tensor_chunks": "tp",
    "parallel.hdp.ring": "hdp",
    "parallel.pipeline": "pp",
    "parallel.stage": "pp",
    "parallel.tied": "pp",
    "parallel.reduce": "hdp",
    "parallel.zero": "hdp",
}
SIGNALS = "host objects"
_DEVICE_WAITS = (".synchronize(", ".tolist(", ".item(", ".cpu(", "elapsed_time(")


@dataclass(frozen=True)
class Group:
    """Ranks of a process group; ``axes`` are its axes by the names of ``AXES``, or its purpose."""

    axes: tuple[str, ...]
    ranks: tuple[int, ...]

    def label(self, room: str) -> str:
        """Return the axis for which ``room`` uses the group."""
        meant = _MEANT.get(room)
        return meant if meant in self.axes else self.axes[0]


@dataclass(frozen=True)
class Wait:
    """A message that a rank waits for: ``operation`` over ``axis``, between ``ranks``.

    ``peer``: the other rank of a send or receive, None for collectives. ``number``: the message's
    number in its group, if torch counts messages.
    """

    operation: str
    axis: str
    ranks: tuple[int, ...]
    peer: int | None = None
    number: int | None = None


@dataclass(frozen=True)
class Place:
    """The current work of a rank; ``where`` is file, line and function of the innermost own frame.

    ``work``: slow work of one rank while the others synchronize (``parallel/agree.py``), or waiting
    for data. ``busy``: True if this rank does that work, False if another rank does. ``compiles``:
    True while torch compiles code.
    """

    phase: str
    step: int | None = None
    micro_batch: int | None = None
    unit: str | None = None
    where: str = ""
    wait: Wait | None = None
    work: str | None = None
    busy: bool = False
    compiles: bool = False

    def facts(self) -> dict[str, Any]:
        """Return the place as JSON, without unknown values."""
        known = asdict(self).items()
        return {key: v for key, v in known if v is not None and v is not False and v != ""}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Place:
        """Return the place from its ``facts``."""
        wait = facts.get("wait")
        if wait is not None:
            wait = Wait(**{**wait, "ranks": tuple(wait["ranks"])})
        return cls(**{**facts, "wait": wait})


@dataclass(frozen=True)
class Look:
    """A place, and a mark that stays the same until the thread makes progress."""

    place: Place
    mark: tuple[Any, ...]


def groups_of(mesh: Mesh) -> dict[str, Group]:
    """Return the groups of a mesh by torch's names."""
    order = {axis: place for place, axis in enumerate(("tp", "pp", "hdp", "ep", "edp", *AXES))}
    found = {
        dist.group.WORLD.group_name: Group(("all ranks",), tuple(range(mesh.world_size)))  # type: ignore[union-attr]
    }
    for each in mesh.communicators:
        axes = tuple(sorted(each.axes, key=order.__getitem__))
        found[each.group.group_name] = Group(axes, _ranks(each.group))
    for name, group in (("host", mesh.host_group), ("checkpoint", mesh.checkpoint_group)):
        found[group.group_name] = Group((name,), _ranks(group))
    return found


def is_waiting(thread: int) -> bool:
    """Return True if a thread waits for a message; takes some microseconds."""
    frame = sys._current_frames().get(thread)
    return frame is not None and frames.waits(frame)


class Places:
    """Locates the training thread; ``groups`` are set once the mesh is open."""

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.groups: Mapping[str, Group] = {}
        self._looped = False  # True after the launch's first step has begun

    def look(self, flights: Sequence[Flight] = (), error: TracebackType | None = None) -> Look:
        """Return the thread's place; ``flights`` are pending messages according to torch.

        ``error``: the traceback of an exception, to locate where it was raised.
        """
        current = sys._current_frames()
        # A reference to this frame would form a cycle that keeps the tensors of all frames alive.
        current.pop(threading.get_ident(), None)
        innermost = current.get(self.thread) if error is None else frames.innermost(error)
        stack = list(frames.outwards(innermost))
        known = frames.known(stack)
        phase = self._phase(stack)
        helper = frames.helper_of(stack)
        inner = stack
        work = known.get("what")
        if helper is not None:
            inner = list(frames.outwards(current.get(helper.ident or 0)))
            work = work or "waiting for data"
        ours = [frame for frame in inner if frames.room_of(frame)]
        place = Place(
            phase=phase,
            step=known.get("step"),
            micro_batch=known.get("micro_batch"),
            unit=known.get("unit"),
            where=frames.where_of(inner, ours),
            wait=self._wait(inner, ours, flights),
            work=work,
            busy=helper is not None,
            compiles=frames.compiles(stack),
        )
        mark: tuple[Any, ...] = (place.step, place.micro_batch, place.phase, frames.marks(inner))
        if helper is None:
            mark += (known.get("meetings"),)
        else:  # the waiting thread keeps synchronizing with other ranks
            mark += (frames.values_of(ours), frames.traffic(helper))
        return Look(place, mark)

    def _phase(self, stack: Sequence[FrameType]) -> str:
        phase = START if not self._looped else END
        for frame in stack:
            room = frames.room_of(frame)
            if room in ("trainer.save", "trainer.state.checkpoint"):
                phase = CHECKPOINT
                break
            if room == "trainer.evaluate":
                phase = EVALUATION
                break
            name = frame.f_code.co_qualname
            if room == "trainer.loop" and name == "Loop._steps":
                self._looped, phase = True, STEP
                break
            if room == "trainer.train" and name.startswith("_Run.") and name != "_Run.train":
                phase = START
                break
        return phase

    def _wait(
        self, stack: Sequence[FrameType], ours: Sequence[FrameType], flights: Sequence[Flight]
    ) -> Wait | None:
        """Return the message that the innermost of these frames wait for."""
        if not stack:
            return None
        device = frames.line_has(stack[0], _DEVICE_WAITS) and any(f.on_device for f in flights)
        blocked = not (device or frames.waits(stack[0]))
        if blocked and not frames.may_wait(stack, ours):
            return None
        name, ranks, peer, sender = None, (), None, ""
        for frame in ours[:1] if blocked else stack[: frames.SEARCHED]:
            if (found := _group_in(frame)) is not None:
                group, peer, sender = found
                name, ranks = group.group_name, _ranks(group)
                break
        flight = _flight(flights, name, device=device)
        if blocked and name is None and (flight is None or flight.described == SIGNALS):
            return None
        if flight is not None:
            name = flight.group
        room = frames.room_of(ours[0]) if ours else ""
        known = self.groups.get(name or "")
        if known is None:
            described = flight.described if flight else name or "unknown"
            known = Group((_BEFORE_MESH.get(described, described),), ranks)
        operation = flight.operation if flight else frames.operation(stack)
        if flight is not None and flight.peer is not None:
            peer = known.ranks[flight.peer] if flight.peer < len(known.ranks) else peer
        return Wait(
            operation,
            known.label(sender or room),
            known.ranks,
            peer,
            flight.number if flight else None,
        )


_BEFORE_MESH = {"default_pg": "all ranks"}  # torch's name for the default process group


def _flight(flights: Sequence[Flight], name: str | None, *, device: bool) -> Flight | None:
    """Return the oldest pending message, of the group ``name`` if known."""
    mine = [flight for flight in flights if flight.on_device == device]
    if name is not None:
        mine = [flight for flight in mine if flight.group == name]
    # The all-reduce of signal flags may be pending together with others (trainer/stop.py).
    return next((f for f in mine if f.described != SIGNALS), mine[0] if mine else None)


def _group_in(frame: FrameType) -> tuple[dist.ProcessGroup, int | None, str] | None:
    """Return the process group in a frame's variables, a peer, and the sending module."""
    values = frame.f_locals
    owner = values.get("self")
    for value in (*values.values(), *vars(owner).values()) if _plain(owner) else values.values():
        if (found := _group(value)) is not None:
            return found
    return None


def _plain(owner: object) -> bool:
    return hasattr(owner, "__dict__")


def _group(value: object) -> tuple[dist.ProcessGroup, int | None, str] | None:
    if isinstance(value, dist.ProcessGroup):
        return value, None, ""
    if isinstance(value, Axis):
        return value.group, None, ""
    if isinstance(value, DeviceMesh) and value.ndim == 1:
        return value.get_group(), None, ""
    if isinstance(value, dist.P2POp):
        return value.group, value.peer, ""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], dist.P2POp):
        return _group(value[0])
    both = getattr(value, "both", None) if "Backward" in type(value).__name__ else value
    if isinstance(both, InTwo) and isinstance(both.there, functools.partial):
        for cell in both.there.func.__closure__ or ():
            if isinstance(cell.cell_contents, Axis):
                room = both.there.func.__module__.removeprefix(frames.OURS)
                return cell.cell_contents.group, None, room
    return None


def _ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
