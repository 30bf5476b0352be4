"""Read a run folder in tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from allometry.trainer.record.columns import COLUMNS


def undeclared(keys: Iterable[str]) -> list[str]:
    """Return the keys that do not match exactly one declared column."""
    return [key for key in keys if sum(column.names(key) for column in COLUMNS) != 1]


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl; all columns must be declared."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found: list[dict[str, Any]] = [json.loads(line) for line in lines]
    unknown = undeclared({key for row in found for key in row})
    assert not unknown, f"columns that trainer/record/columns.py does not declare: {unknown}"
    return found


def events(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a run's events.jsonl."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
