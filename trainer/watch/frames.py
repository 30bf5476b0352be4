"""Interpret a thread's stack frames: module, micro-batch, and the message it waits for."""

from __future__ import annotations

import linecache
import re
import threading
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any

OURS = "allometry."
SEARCHED = 16
"""Innermost frames that are searched for the process group of a message."""
_ITERATED = {
    "Accumulation._train": "index",
    "Accumulation.evaluate": "index",
    "Accumulation.count_visits": "index",
    "PipelineExecution._forward": "index",
    "Stage.forward_maybe_with_nosync": "index",
    "Stage.backward_one_chunk": "bwd_chunk_id",
    "Stage.backward_weight_one_chunk": "bwd_chunk_id",
    "Stage.forward_one_chunk": "fwd_chunk_id",
}
"""Name of the local variable with the micro-batch's number, by function."""
_NAMED = {
    "_Bucket.wait": "all_reduce",
    "_Hop.wait": "send and recv of keys and values",
    "Axis.receive": "recv",
    "Mirrors.send_value": "send of the tied weight",
    "Mirrors.return_gradient": "send of the tied gradient",
    "StopRequest._read": "all_reduce of signals",
}
"""Messages of allometry, by the function that waits for them."""
_PLUMBING = ("torch.", "threading", "queue", "concurrent.", "socket", "selectors", "subprocess")
"""Modules that do not identify the awaited event."""
_SCHEDULES = "torch.distributed.pipelining.schedules"


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def innermost(traceback: TracebackType) -> FrameType:
    """Return the frame in which an exception was raised."""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame


def room_of(frame: FrameType) -> str:
    """Return the module of an allometry frame, such as ``parallel.reduce``; "" for other frames."""
    name: str = frame.f_globals.get("__name__", "")
    own = name.startswith(OURS) and not name.startswith("allometry.trainer.watch")
    return name.removeprefix(OURS) if own else ""


def where_of(stack: Sequence[FrameType], ours: Sequence[FrameType]) -> str:
    """Return file, line and function of the innermost allometry frame, and of a frame inside it."""
    if not stack:
        return ""
    own = ""
    if ours:
        path = room_of(ours[0]).replace(".", "/")
        own = f"{path}.py:{ours[0].f_lineno} {ours[0].f_code.co_qualname}"
    inner = next(
        (f for f in stack if not f.f_globals.get("__name__", "").startswith(_PLUMBING)), None
    )
    if inner is None or (ours and inner is ours[0]):
        return own
    file = inner.f_code.co_filename.rpartition("/")[2]
    return f"{own} > {file}:{inner.f_lineno} {inner.f_code.co_qualname}".removeprefix(" > ")


def known(stack: Sequence[FrameType]) -> dict[str, Any]:
    """Return step, micro-batch, unit and meeting from the frames; inner frames take precedence."""
    found: dict[str, Any] = {}
    for frame in stack:
        name, room = frame.f_code.co_qualname, room_of(frame)
        if frame.f_globals.get("__name__") == _SCHEDULES:
            found = _of_schedule(frame) | found
        elif not room:
            owner = frame.f_locals.get("self") if "fsdp" in frame.f_code.co_filename else None
            unit = getattr(owner, "_module_fqn", None)
            if isinstance(unit, str):
                found.setdefault("unit", unit or "root")
        elif name == "Loop._steps":
            found.setdefault("step", frame.f_locals.get("step"))
        elif name in _ITERATED:
            index = frame.f_locals.get(_ITERATED[name])
            if isinstance(index, int):
                found.setdefault("micro_batch", index)
        elif name == "Transformer.forward" and "layer" in frame.f_locals:
            found.setdefault("unit", f"blocks.{frame.f_locals['layer']}")
        elif name == "wait_for_all":
            found |= {key: frame.f_locals.get(key) for key in ("what", "meetings")}
    return found


def _of_schedule(frame: FrameType) -> dict[str, Any]:
    """Return micro-batch and stage in a frame of torch's pipeline schedule."""
    values = frame.f_locals
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    names = ("bwd_mb_index", "fwd_mb_index") if "bwd_" in line else ("fwd_mb_index",)
    index = next((values[n] for n in (*names, "mb_index", "i") if n in values), None)
    stage = getattr(getattr(values.get("self"), "_stage", None), "stage_index", None)
    stage = values.get("stage_idx", stage)
    found = {} if index is None else {"micro_batch": index}
    return found if stage is None else found | {"unit": f"stage {stage}"}


def helper_of(stack: Sequence[FrameType]) -> threading.Thread | None:
    """Return the thread of this rank for which the stack's thread waits; None if there is none."""
    for frame in stack:
        name = frame.f_code.co_qualname
        if name == "Prefetcher.__next__":
            return _thread("prefetch")
        if name == "wait_for_all":
            what = frame.f_locals.get("what", "")
            return _thread("save-" if what == "saving a checkpoint" else what)
    return None


def _thread(name: str) -> threading.Thread | None:
    """Return the thread with this name or name prefix."""
    return next((t for t in threading.enumerate() if name and t.name.startswith(name)), None)


def waits(frame: FrameType) -> bool:
    """Return True if an innermost frame waits for a message in torch's code."""
    module: str = frame.f_globals.get("__name__", "")
    if module.startswith("torch.distributed"):
        return True
    if module == "torch._ops":
        return "c10d" in str(getattr(frame.f_locals.get("self"), "_name", ""))
    return module.startswith(OURS) and line_has(frame, (".wait(", "wait_tensor("))


def may_wait(stack: Sequence[FrameType], ours: Sequence[FrameType]) -> bool:
    """Return True if frames may wait for a message in a torch operator called by allometry.

    The tensor that a message fills is waited for in the operator that first reads it.
    """
    if not ours or line_has(ours[0], ("sleep(",)):
        return False
    inner = [frame.f_globals.get("__name__", "") for frame in stack[: stack.index(ours[0])]]
    compiles = ("torch._dynamo", "torch._inductor", "torch.fx")
    return all(name.startswith("torch") and not name.startswith(compiles) for name in inner)


def compiles(stack: Sequence[FrameType]) -> bool:
    """Return True if torch compiles code in these frames."""
    places = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx")
    return any(frame.f_globals.get("__name__", "") in places for frame in stack)


def line_has(frame: FrameType, texts: tuple[str, ...]) -> bool:
    """Return True if the current line of a frame contains one of the texts."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return any(text in line for text in texts)


def operation(stack: Sequence[FrameType]) -> str:
    """Return the name of the message in the innermost frames."""
    for frame in stack[:SEARCHED]:
        module = frame.f_globals.get("__name__")
        if module == "torch.distributed.distributed_c10d":
            return frame.f_code.co_name.lstrip("_")
        if module == _SCHEDULES and (message := _staged(frame)) is not None:
            return message
        if room_of(frame):
            return _NAMED.get(frame.f_code.co_qualname, frame.f_code.co_qualname)
    return stack[0].f_code.co_name


def _staged(frame: FrameType) -> str | None:
    """Return the message of a pipeline schedule: activations or gradients of stages."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    found = re.findall(r"(fwd|bwd)_(send|recv)", line)
    if not found and "in works" in linecache.getline(frame.f_code.co_filename, frame.f_lineno - 1):
        ops = frame.f_locals.get("ops") or ()
        way = "bwd" if "bwd_sends_to_wait" in frame.f_locals else "fwd"
        found = [(way, op.op.__name__.lstrip("i")) for op in ops]
    kinds = {"fwd": "activations", "bwd": "gradients"}
    said = dict.fromkeys(f"{move} of {kinds[way]}" for way, move in found)
    return " and ".join(said) or None


def marks(stack: Sequence[FrameType]) -> tuple[tuple[int, int], ...]:
    """Return a mark that changes whenever the thread makes progress."""
    return tuple((id(frame), frame.f_lasti) for frame in stack)


def values_of(frames: Sequence[FrameType]) -> tuple[int, ...]:
    """Return the ids of the objects in the frames' local variables."""
    return tuple(id(value) for frame in frames for value in frame.f_locals.values())


def traffic(thread: threading.Thread) -> str:
    """Return a thread's I/O counters, to distinguish a slow disk from a hung one."""
    try:
        with open(f"/proc/self/task/{thread.native_id}/io", encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""
