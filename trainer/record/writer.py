"""Write a run's record: metrics, events, and run.json."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from allometry.trainer.record.appending import Appender
from allometry.trainer.state.folder import RunFolder, write_atomically

Row = dict[str, float | int]


class Recorder:
    """Appends rows and events, on the main rank only.

    A row that cannot be written (a full disk) does not end the run: it is kept and retried with the
    next row.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        # The other files do not exist in every run, and are opened at the first write.
        self._files = {path: Appender(path) for path in (folder.metrics, folder.events)}
        for file in self._files.values():
            file.open()

    def row(self, row: Row) -> None:
        """Append one row to metrics.jsonl."""
        self._append(self._folder.metrics, row)

    def loads(self, step: int, loads: Mapping[str, list[float]]) -> None:
        """Append each expert's share of tokens, by layer, to expert_load.jsonl."""
        self._append(self._folder.loads, {"step": step, "load": loads})

    def plan(self, step: int, record: Mapping[str, Any]) -> None:
        """Append the assignment of a step's documents to ranks (``plan_record``) to plans.jsonl."""
        self._append(self._folder.plans, {"step": step, **record})

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        if path not in self._files:
            self._files[path] = Appender(path)
        self._files[path].append((json.dumps(row, allow_nan=True) + "\n").encode())

    def event(self, kind: str, **details: Any) -> None:
        """Append one event, with the time, to events.jsonl."""
        row = {"event": kind, "time": round(time.time(), 3), **details}
        self._append(self._folder.events, row)

    def close(self) -> str | None:
        """Write pending rows and close the files; describe rows that could not be written."""
        lost = [text for file in self._files.values() if (text := file.close()) is not None]
        return "; ".join(lost) or None


def versions() -> dict[str, str]:
    """Return the versions of packages that affect results; "not installed" for missing packages."""
    names = (
        *("allometry", "torch", "numpy", "megatron-core", "triton"),
        *("flash-attn", "flash-attn-3", "apex", "deepspeed"),
    )
    installed = {"python": platform.python_version()}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    installed["cuda"] = torch.version.cuda or "none"
    return installed


def commit() -> str | None:
    """Return the commit of the running source tree, with '+' if modified; None outside git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        options: dict[str, Any] = {"cwd": here.parent, "capture_output": True, "text": True}
        return subprocess.run(command, timeout=5, check=True, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed in another repository?
        return git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_run(folder: RunFolder, facts: dict[str, Any], launch: dict[str, Any]) -> None:
    """Write run.json: the current facts, and this launch appended to the list of launches.

    The origin of the weights is a fact of the first launch, and is kept.
    """
    launches = folder.recorded().get("launches", [])
    launches.append({**launch, "time": round(time.time(), 3)})
    content = {**folder.origin(), **facts, "launches": launches}
    write_atomically(folder.run, json.dumps(content, indent=2) + "\n")
