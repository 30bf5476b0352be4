"""Read the files of a run folder during training, and compare two runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_settings import STEPS

MEASURED = ("time_s", "tokens_per_s", "mfu", "peak_bytes", "offload/", "ranks/", "cards/")
"""Prefixes of metric columns that depend on clocks or on the system."""


def clear(folder: Path) -> None:
    """Remove a run folder and the files next to it whose names begin with the folder's name."""
    for place in folder.parent.glob(f"{folder.name}*"):
        if place.name.removeprefix(folder.name)[:1] in ("", "."):
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    folder.parent.mkdir(parents=True, exist_ok=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON lines file; an empty list if the file is missing."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return []
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the complete rows of metrics.jsonl."""
    return read(folder / "metrics.jsonl")


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the complete lines of events.jsonl."""
    return read(folder / "events.jsonl")


def newest(folder: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 if there is none."""
    whole = folder.glob("checkpoints/step-*/complete.json")
    return max((int(path.parent.name.partition("-")[2]) for path in whole), default=0)


def differing(
    some: list[dict[str, Any]], others: list[dict[str, Any]], but: tuple[str, ...] = ()
) -> int:
    """Count the rows that differ, ignoring the MEASURED columns and those with prefixes ``but``."""

    def kept(row: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if not key.startswith((*MEASURED, *but))}

    pairs = zip(some, others, strict=False)
    return sum(kept(a) != kept(b) for a, b in pairs) + abs(len(some) - len(others))


def differing_tensors(one: Path, other: Path) -> int:
    """Count the tensors that differ bitwise between the last checkpoints of two runs."""
    import torch
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from allometry.trainer.state.shards import ShardReader

    def tensors(prefix: str, value: Any) -> Iterator[tuple[str, bytes]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from tensors(f"{prefix}.{key}", inner)
        else:
            yield prefix, value.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    found = []
    for folder in (one, other):
        place = folder / "checkpoints" / f"step-{STEPS}"
        if not place.exists():
            return -1
        state: dict[str, Any] = {}
        planner = _EmptyStateDictLoadPlanner()
        reader = ShardReader(place)
        _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
        found.append(dict(tensors("", state)))
    names = found[0].keys() | found[1].keys()
    return sum(found[0].get(name) != found[1].get(name) for name in names)
