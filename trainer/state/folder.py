"""A run's folder: who may write in it, and what it already holds.

config.yaml     the resolved configuration
run.json        versions, counts, multipliers, layout, data fingerprints, tokenizer, launches
tokenizer.json  the tokenizer of the data, where it is known, and the files beside it
metrics.jsonl   one row for each recorded step
expert_load.jsonl  the experts' share of tokens at the same steps, by layer (mixtures of experts)
plans.jsonl     how documents lay on ranks at the same steps (data.kind: documents)
scores.jsonl    what evaluations of its checkpoints gave, where there were any
events.jsonl    what happened and when
logs/           what each rank said of a run that hung (trainer/watch)
tb/             TensorBoard
pins/           which other runs begin at which of its checkpoints
checkpoints/step-N/, latest
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from allometry.configs.errors import UserError
from allometry.configs.json_file import parse_object, read_object

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or a quota, without room."""
RETRY_AFTER_S = (0.5, 2.0)
"""Pauses before a small file that found no room is tried again."""
_ABANDONED_S = 3600.0
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")
_LONGEST_NAME = 100


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old or the new, never a half.

    Where the disk is full it is tried again ``len(RETRY_AFTER_S)`` times.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.
    """
    for pause in (*RETRY_AFTER_S, None):
        try:
            _replace(path, text)
        except OSError as error:
            if pause is None or error.errno not in FULL:
                raise
            time.sleep(pause)
        else:
            return


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class RunFolder:
    """The paths of a run, and the lock that keeps a second live run out."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.run = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.loads = self.path / "expert_load.jsonl"
        self.plans = self.path / "plans.jsonl"
        self.scores = self.path / "scores.jsonl"
        self.rewinds = self.path / "rewinds.json"
        self.tensorboard = self.path / "tb"
        self.checkpoints = self.path / "checkpoints"
        self.latest = self.path / "latest"
        self._lock: IO[str] | None = None
        self._made: list[Path] = []  # by ``claim``, the deepest first
        self._written: list[Path] = []  # files that were not there when it was claimed

    def log(self, rank: int) -> Path:
        """Return the log of a rank, which is there once the rank has something to say."""
        return self.path / "logs" / f"rank-{rank}.log"

    def claim(self) -> None:
        """Make the folder and hold its lock until ``release`` or the end of the process.

        Raises UserError if another live process holds it or it cannot be made.
        """
        places = (self.checkpoints, self.path, *self.path.parents)
        self._made = [place for place in places if not place.exists()]
        files = (self.config, self.metrics, self.events, self.loads, self.plans, self.scores)
        self._written = [file for file in files if not file.exists()]
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / "run.lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"run.folder={self.path} cannot be written ({error.strerror}); choose another"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise UserError(
                f"run.folder={self.path} is in use by {owner}; wait for it, stop it, or choose "
                "another run.folder"
            ) from None
        self._lock = lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        lock.flush()

    def release(self) -> None:
        """Let another run have the folder."""
        if self._lock is not None:
            with suppress(OSError):  # what it says could not be written: the disk is full
                self._lock.close()
            self._lock = None

    def recorded(self) -> dict[str, Any]:
        """What run.json says; nothing before the first launch.

        Raises:
            UserError: it cannot be read.
        """
        if not self.run.exists():
            return {}
        try:
            content = read_object(self.run)
            if not isinstance(content.get("launches", []), list):
                raise ValueError("launches is not a list")
            return content
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.run} cannot be read ({error}); restore it, or choose another run.folder"
            ) from None

    def read_latest(self) -> str | None:
        """Return the name in the ``latest`` pointer; None if nothing was ever saved.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with open(self.latest, encoding="utf-8", errors="replace") as file:
                return file.read(_LONGEST_NAME).strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"{self.latest} cannot be read ({error.strerror}); make it a file that names a "
                "checkpoint, or remove it"
            ) from None

    def origin(self) -> dict[str, Any]:
        """``{"origin": ...}`` as run.json has it, for a run whose first weights were imported."""
        return {key: value for key, value in self.recorded().items() if key == "origin"}

    def withdraw(self) -> None:
        """Release, and leave the place as ``claim`` found it if no run was begun.

        A run begins with its run.json; a launch that is refused before leaves nothing of its own.
        One that hung leaves what its watchdog has written.
        """
        begun = self.run.exists() or self.log(0).parent.exists()
        if self._lock is not None and not begun and self.config in self._written:
            for file in self._written:
                file.unlink(missing_ok=True)
            if self.checkpoints in self._made:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            (self.path / "run.lock").unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something there
                for place in self._made:
                    if place != self.checkpoints:
                        place.rmdir()
        self.release()

    def is_new(self) -> bool:
        """Whether no run was ever started here."""
        return not self.config.exists()

    def check_config_is_there(self, first_step: int) -> None:
        """Raise UserError where a run stands whose config.yaml is gone: it would begin again.

        ``first_step``: of the checkpoint that an interrupted start with another run's leaves.
        """
        names = {path.name for path in self.checkpoints.glob("step-*")} - {f"step-{first_step}"}
        if not self.config.exists() and (self.run.exists() or names):
            raise UserError(
                f"run.folder={self.path} holds a run, but its config.yaml is gone; restore it, or "
                "choose another run.folder to begin anew"
            )

    def remove_temporary(self) -> list[str]:
        """Remove what interrupted atomic writes of a run have left; the names removed.

        The lock must be held. Files that others write too (scores, pins) may be under way, and go
        when they have not changed for an hour.
        """
        removed, now = [], time.time()
        for place in (self.path, self.checkpoints, self.path / "pins"):
            for path in place.glob(".*.tmp"):
                name = _TEMPORARY.fullmatch(path.name)
                if name is None:
                    continue
                shared = place.name == "pins" or name["name"] == self.scores.name
                with suppress(OSError):
                    if not shared or now - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()
                        removed.append(path.name)
        return removed

    def forget_after(self, step: int) -> int:
        """Drop metrics rows past ``step`` (they will be computed again); how many there were.

        A torn last line, which a crash while writing leaves, goes too.
        """
        _cut(self.loads, step)
        _cut(self.plans, step)
        _cut(self.scores, step)
        return _cut(self.metrics, step)


def _cut(path: Path, step: int) -> int:
    """Drop the rows of ``path`` past ``step``; how many there were."""
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        row = _row(line)
        if row is not None and row["step"] <= step:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        write_atomically(path, "".join(line + "\n" for line in kept))
    return dropped


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = parse_object(line)
    except ValueError:
        return None
    return row if isinstance(row.get("step"), int) else None
