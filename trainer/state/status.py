"""Report the status of a run from the files in its folder, without importing torch."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from allometry.configs.errors import ConfigError, UserError
from allometry.configs.json_file import parse_object, read_object
from allometry.configs.source import parse_file
from allometry.laws.runs import read_lines
from allometry.trainer.state.pins import DESCRIBED, Pin, pins

State = Literal["new", "running", "stopped", "crashed", "diverged", "ended"]
_ENDS: dict[str, State] = {"finished": "ended", "stopped": "stopped", "not_finite": "diverged"}
_LAUNCHED = ("started", "resumed", "branched")
_TAIL = 1 << 16


@dataclass(frozen=True)
class RunStatus:
    """Status of the run in ``folder``.

    ``state``: ``new`` has taken no step; ``running`` means that a live process has the lock;
    otherwise the last launch ended the run (``ended``), was ``stopped`` by a signal or at a step,
    ended with a loss that was not finite (``diverged``), or ended without an event (``crashed``).
    ``host``: host of the last launch. ``step``, ``tokens`` and ``loss``: of the last recorded step;
    ``validation``: its held-out losses, if any. ``parent`` and ``parent_step``: the run and step
    from which it branches; ``origin``: the origin of imported weights, as in run.json. ``files``:
    size on disk of each file, keyed by device and inode, so that files shared by runs count once.
    """

    folder: Path
    state: State
    host: str | None
    step: int
    total_steps: int | None
    tokens: int
    loss: float | None
    validation: dict[str, float]
    parent: Path | None
    parent_step: int | None
    origin: dict[str, Any] | None
    checkpoints: tuple[int, ...]
    pins: tuple[Pin, ...]
    files: dict[tuple[int, int], int]

    @property
    def bytes(self) -> int:
        """Size on disk, including files shared with other runs."""
        return sum(self.files.values())


def is_run(folder: Path) -> bool:
    """Return True for the folder of a run, or of a branch that has not begun."""
    return any((folder / name).is_file() for name in ("config.yaml", DESCRIBED))


def status_of(folder: Path) -> RunStatus:
    """Return the status of a run, which may be training.

    Raises:
        UserError: a file of its folder cannot be read.
    """
    begun = (folder / "config.yaml").is_file()
    try:
        described = parse_file(folder / ("config.yaml" if begun else DESCRIBED)).data
    except ConfigError as error:
        raise UserError(str(error)) from None
    record = _record(folder / "run.json")
    section = described.get("run")
    parent = record.get("parent") or (section.get("parent") if isinstance(section, dict) else None)
    parent = parent if isinstance(parent, dict) and "folder" in parent else None
    origin = record.get("origin")
    row = last_row(folder / "metrics.jsonl")
    plan = record.get("plan")
    total = plan.get("total_steps") if isinstance(plan, dict) else None
    return RunStatus(
        folder=folder,
        state=_state(folder),
        host=(_owner(folder / "run.lock") or (None, None))[1],
        step=_count(row.get("step")),
        total_steps=total if isinstance(total, int) else None,
        tokens=_count(row.get("tokens")),
        loss=_number(row.get("loss")),
        validation={
            key.removeprefix("validation/"): loss
            for key, value in row.items()
            if key.startswith("validation/") and (loss := _number(value)) is not None
        },
        parent=Path(str(parent["folder"])) if parent else None,
        parent_step=_count(parent.get("step")) if parent else None,
        origin=origin if isinstance(origin, dict) and not parent else None,
        checkpoints=tuple(sorted(_checkpoints(folder))),
        pins=tuple(pins(folder)),
        files=_files(folder),
    )


def _number(value: object) -> float | None:
    """Return a number of a row; None for a value that is not a number."""
    return float(value) if isinstance(value, int | float) and abs(value) < 1e300 else None


def _count(value: object) -> int:
    number = _number(value)
    return 0 if number is None else int(number)


def parents(runs: Sequence[RunStatus]) -> list[int | None]:
    """Return the index of each run's parent in ``runs``; None if it is not among them.

    A parent is found by its path, or by its name in the folder that contains the branch.
    """
    places = {run.folder.resolve(): place for place, run in enumerate(runs)}
    found: list[int | None] = []
    for place, run in enumerate(runs):
        beside = run.folder.resolve().parent / run.parent.name if run.parent else None
        named = [path for path in (run.parent and run.parent.resolve(), beside) if path in places]
        found.append(places[named[0]] if named and places[named[0]] != place else None)
    return found


def _state(folder: Path) -> State:
    if is_held(folder / "run.lock"):
        return "running"
    said = [event.get("event") for event in read_lines(folder / "events.jsonl")]
    last = next((kind for kind in reversed(said) if kind in (*_LAUNCHED, *_ENDS)), None)
    if last is None:
        return "new" if not (folder / "metrics.jsonl").is_file() else "crashed"
    return _ENDS.get(last, "crashed")


def _record(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or remove it") from None


def _checkpoints(folder: Path) -> Iterator[int]:
    for path in (folder / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and (path / "complete.json").is_file():
            yield int(number)


def _files(folder: Path) -> dict[tuple[int, int], int]:
    """Return the bytes of each file on disk; files removed meanwhile are omitted."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(place, name))
            except OSError:
                continue
            found[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    return found


def last_row(path: Path) -> dict[str, Any]:
    """Return the last complete row of metrics.jsonl; empty without one."""
    try:
        size = path.stat().st_size
        file = open(path, "rb")  # noqa: SIM115
    except OSError:
        return {}
    with file:
        tail = 0
        while tail < size:
            tail = min(size, 2 * tail or _TAIL)
            file.seek(size - tail)
            lines = file.read(tail).split(b"\n")
            # The first line may be partial, and text after the last newline is incomplete.
            whole = lines[:-1] if tail == size else lines[1:-1]
            for line in reversed(whole):
                with suppress(ValueError):
                    return parse_object(line)
    return {}


def _owner(path: Path) -> tuple[int, str] | None:
    """Return process id and host of the last launch, as written in the run's lock."""
    try:
        words = path.read_text(encoding="utf-8").split()
        return int(words[1]), words[3]
    except (OSError, ValueError, IndexError):
        return None


def is_held(path: Path) -> bool:
    """Return True if a live process on this or another host has the run's lock.

    The lock is tried only if its last owner may still be alive, to avoid disturbing a launch that
    takes the lock.
    """
    owner = _owner(path)
    if owner is None:
        return False
    if owner[1] == socket.gethostname() and not Path(f"/proc/{owner[0]}").exists():
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
