"""Reading a run's folder in tests, without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's events.jsonl."""
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
