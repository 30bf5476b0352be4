"""Read torch's flight recorder: the messages that a rank has begun and not completed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAMES = ("_dump_nccl_trace", "_dump_fr_trace")
"""Recorders of NCCL and of other back ends; older versions of torch lack the second."""


@dataclass(frozen=True)
class Flight:
    """A pending message; ``group`` is torch's name of its process group.

    ``described`` is the group's description. ``number`` counts the messages of a group; ``peer`` is
    a rank in the group, None for collectives.
    """

    group: str
    described: str
    operation: str
    number: int
    on_device: bool
    peer: int | None = None


def _function(name: str) -> Callable[..., Any] | None:
    import torch._C._distributed_c10d as c10d

    return getattr(c10d, name, None)


def record() -> None:
    """Enable torch's flight recorder; call before the first process group is created.

    A user's setting is kept. Newer versions of torch enable the recorder by default.
    """
    known = _function("_dump_fr_trace") is not None
    name = "TORCH_FR_BUFFER_SIZE" if known else "TORCH_NCCL_TRACE_BUFFER_SIZE"
    os.environ.setdefault(name, "2000")


def flights() -> list[Flight]:
    """Return this rank's pending messages, the oldest first; empty if torch has no recorder."""
    found: list[Flight] = []
    for name in _NAMES:
        dump = _function(f"{name}_json")
        if dump is not None:
            found += parse(json.loads(dump(True, True)), on_device=name == _NAMES[0])
    return found


def parse(record: dict[str, Any], *, on_device: bool) -> list[Flight]:
    """Return the pending messages in a record."""
    found = []
    for entry in record.get("entries", ()):
        if entry.get("retired") or entry.get("state") == "completed":
            continue
        group, described = entry["process_group"]
        name = str(entry["profiling_name"]).partition(":")[2]
        single = re.match(r"(send|recv)\s+(\d+)(?:->|<-)(\d+)", name)
        number = entry["p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id"]
        peer = int(single[3]) if single else None
        operation = single[1] if single else name
        found.append(Flight(group, described, operation, int(number), on_device, peer))
    return found


def dump(path: Path) -> list[Path]:
    """Write torch's records next to ``path``, as pickles for torch's own analyzer."""
    written = []
    for name in _NAMES:
        record = _function(name)
        if record is None:
            continue
        content = record()
        if content:
            place = path.with_suffix(".nccl.pickle" if name == _NAMES[0] else ".flight.pickle")
            place.write_bytes(content)
            written.append(place)
    return written
