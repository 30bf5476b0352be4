"""Runs in a folder, with their states and parents: ``allometry runs``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allometry.configs.errors import UserError
from allometry.configs.format import human
from allometry.launch.command import Report
from allometry.launch.runs.commands import Runs
from allometry.launch.text import counted, table
from allometry.trainer.state.room import megabytes
from allometry.trainer.state.status import RunStatus, is_run, parents, status_of

_DEEPEST = 6
_HEAD = ("run", "state", "step", "tokens", "loss", "size", "branches from", "checkpoints")
_RIGHT = (2, 3, 4, 5)
_NO_RUN = "is passed over: it is no run's folder."


@dataclass(frozen=True)
class _Found:
    """Runs, and a sentence for each folder that is not a run."""

    runs: list[RunStatus]
    passed_over: list[str]


def listed(asked: Runs) -> Report:
    """List the runs in a folder. Raises UserError: the folder is missing or has no run.

    For example, ``listed(Runs(folder=Path("runs"), tree=True)).text``.
    """
    if not asked.folder.is_dir():
        raise UserError(f"{asked.folder} is not a folder; name one that holds runs")
    found = _Found([], [])
    _search(asked.folder, found, 0)
    if not found.runs:
        why = f" ({found.passed_over[0]})" if found.passed_over else ""
        raise UserError(
            f"{asked.folder} holds no run{why}; name a folder that holds runs (run.folder)"
        )
    places = parents(found.runs)
    names = [_name(run.folder, asked.folder) for run in found.runs]
    by_inode: dict[tuple[int, int], int] = {}
    for run in found.runs:
        by_inode |= run.files
    on_disk = sum(by_inode.values())
    facts = {
        "folder": str(asked.folder),
        "bytes": on_disk,
        "runs": [
            _facts(run, name, None if place is None else names[place])
            for run, name, place in zip(found.runs, names, places, strict=True)
        ],
        "passed_over": found.passed_over,
    }
    order = _as_tree(places) if asked.tree else [(place, 0) for place in range(len(names))]
    rows = [_HEAD, *(_row(found.runs, names, places, place, depth) for place, depth in order)]
    shared = sum(run.bytes for run in found.runs) - on_disk
    lines = [
        table(rows, right=_RIGHT),
        f"{counted(len(names), 'run')}, {megabytes(on_disk)} on disk"
        + (f" ({megabytes(shared)} of checkpoints are shared and counted once)" if shared else ""),
        *_elsewhere(found.runs, names),
        *found.passed_over,
    ]
    return Report(facts, "\n".join(lines))


def _search(folder: Path, found: _Found, depth: int) -> None:
    """Add the runs in ``folder``, or the reason for passing over it."""
    if is_run(folder):
        try:
            found.runs.append(status_of(folder))
        except (UserError, OSError) as error:
            found.passed_over.append(f"{folder} is passed over: {error}.")
        return
    inside = folder / "runs"
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
        # A ladder or tree keeps its runs in runs/, apart from descriptions and logs.
        if inside in below and not any(is_run(path) for path in below):
            below = sorted(path for path in inside.iterdir() if path.is_dir())
    except OSError as error:
        found.passed_over.append(f"{folder} is passed over: {error.strerror}.")
        return
    within = _Found([], [])
    for path in below if depth < _DEEPEST else ():
        if not path.name.startswith("."):
            _search(path, within, depth + 1)
    found.runs.extend(within.runs)
    if within.runs or not depth or any(not said.endswith(_NO_RUN) for said in within.passed_over):
        found.passed_over.extend(within.passed_over)
    else:  # one sentence for the complete folder
        found.passed_over.append(f"{folder} {_NO_RUN}")


def _name(folder: Path, below: Path) -> str:
    """Return a run's path relative to the listed folder."""
    return str(folder.relative_to(below)) if folder != below else str(folder)


def _as_tree(places: Sequence[int | None]) -> list[tuple[int, int]]:
    """Return the indices of the runs, branches after their trunks, each with its depth."""
    order: list[tuple[int, int]] = []

    def add(place: int, depth: int) -> None:
        order.append((place, depth))
        for child, parent in enumerate(places):
            if parent == place and all(child != one for one, _ in order):
                add(child, depth + 1)

    for place, parent in enumerate(places):
        if parent is None:
            add(place, 0)
    seen = {place for place, _ in order}
    return order + [(place, 0) for place in range(len(places)) if place not in seen]


def _row(
    runs: Sequence[RunStatus],
    names: Sequence[str],
    places: Sequence[int | None],
    place: int,
    depth: int,
) -> tuple[str, ...]:
    run, parent = runs[place], places[place]
    steps = f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)
    origin = "" if run.parent is None else names[parent] if parent is not None else str(run.parent)
    return (
        "  " * depth + names[place],
        run.state,
        steps,
        human(run.tokens),
        f"{run.loss:.4f}" if isinstance(run.loss, int | float) else "",
        megabytes(run.bytes),
        f"{origin}, step {run.parent_step}" if origin else _initial(run),
        ", ".join(_checkpoint(run, step) for step in _steps(run)),
    )


_ORIGIN = ("run", "source", "step", "hash", "keep")


def _initial(run: RunStatus) -> str:
    """Return the initial state of a run that is not a branch; empty if it was initialized."""
    if run.origin is None:
        return ""
    name = Path(str(run.origin.get("run") or run.origin.get("source"))).name
    step = f", step {run.origin['step']}" if "step" in run.origin else ""
    return f"({', '.join(run.origin.get('keep', ['weights']))} of {name}{step})"


def _steps(run: RunStatus) -> list[int]:
    return sorted({*run.checkpoints, *(pin.step for pin in run.pins)})


def _checkpoint(run: RunStatus, step: int) -> str:
    """Return a kept checkpoint as text, with the branches that pin it."""
    said = [] if step in run.checkpoints else ["gone"]
    by = [
        f"{one.by.name} (missing)" if one.missing else one.by.name
        for one in run.pins
        if one.step == step
    ]
    said += [f"pinned by {', '.join(by)}"] if by else []
    return f"{step} ({', '.join(said)})" if said else str(step)


def _elsewhere(runs: Sequence[RunStatus], names: Sequence[str]) -> list[str]:
    """Return a remark on crashed runs of other hosts, which may still be running there."""
    here = socket.gethostname()
    far = [
        f"{name} on {run.host}"
        for run, name in zip(runs, names, strict=True)
        if run.state == "crashed" and run.host not in (None, here)
    ]
    if not far:
        return []
    return [f"crashed, or running where its lock is not seen from here: {', '.join(far)}"]


def _facts(run: RunStatus, name: str, parent: str | None) -> dict[str, Any]:
    return {
        "run": name,
        "folder": str(run.folder),
        "state": run.state,
        "host": run.host,
        "step": run.step,
        "total_steps": run.total_steps,
        "tokens": run.tokens,
        "loss": run.loss,
        "validation": run.validation,
        "bytes": run.bytes,
        "parent": parent,
        "parent_folder": str(run.parent) if run.parent else None,
        "parent_step": run.parent_step,
        "initial": {k: run.origin[k] for k in _ORIGIN if k in run.origin} if run.origin else None,
        "checkpoints": list(run.checkpoints),
        "pins": [{"step": one.step, "by": str(one.by), "missing": one.missing} for one in run.pins],
    }
