"""Reader for an offline Weights & Biases run: protobuf records in LevelDB log blocks."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 1 << 15


def records(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a ``.wandb`` file, in order."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), HEADER, b""
    while place + 7 <= len(data):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict[str, Any]]:
    """Return the logged rows of a run by key, with W&B's own count ``_step``.

    W&B's own process may write the end of the file after the run's ``finish`` has returned.
    """
    until = time.monotonic() + 60.0
    while not any(kind == "exit" for kind, _ in kinds(path)):
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.05)
    rows = []
    for kind, record in kinds(path):
        if kind == "history":
            items = record.history.item
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append(row | {"_step": record.history.step.num})
    return rows


def kinds(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records with their kinds."""
    return ((record.WhichOneof("record_type"), record) for record in records(path))
