"""Writing a run's record: metrics, events, and what describes the run as a whole."""

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
    """Appends rows and events; only the main rank has one.

    A row that cannot be written (a full disk) must not end the run: it is kept and tried again
    with the next one.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        # Not every run has the others, which are opened when they are first written to.
        self._files = {path: Appender(path) for path in (folder.metrics, folder.events)}
        for file in self._files.values():
            file.open()

    def row(self, row: Row) -> None:
        """Append one row to metrics.jsonl."""
        self._append(self._folder.metrics, row)

    def loads(self, step: int, loads: Mapping[str, list[float]]) -> None:
        """Append the share of tokens that each expert took, by layer, to expert_load.jsonl."""
        self._append(self._folder.loads, {"step": step, "load": loads})

    def plan(self, step: int, record: Mapping[str, Any]) -> None:
        """Append how a step's documents were shared out (``plan_record``) to plans.jsonl."""
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
        """Write what is pending and close the files; what could not be written, if anything."""
        lost = [text for file in self._files.values() if (text := file.close()) is not None]
        return "; ".join(lost) or None


def versions() -> dict[str, str]:
    """Versions of what shapes the numbers; a package that is absent says so."""
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
    """The commit of the source tree that runs, with '+' if it has changes; None outside git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        options: dict[str, Any] = {"cwd": here.parent, "capture_output": True, "text": True}
        return subprocess.run(command, timeout=5, check=True, **options).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside somebody else's tree?
        return git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def write_run(folder: RunFolder, facts: dict[str, Any], launch: dict[str, Any]) -> None:
    """Write run.json: the facts as they are now, and one more launch on the list of launches.

    Where the weights came from is a fact of the first launch, and kept.
    """
    launches = folder.recorded().get("launches", [])
    launches.append({**launch, "time": round(time.time(), 3)})
    content = {**folder.origin(), **facts, "launches": launches}
    write_atomically(folder.run, json.dumps(content, indent=2) + "\n")
