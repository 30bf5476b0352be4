"""Files of a run folder, and the lock against a second live run.

config.yaml     the resolved configuration
run.json        versions, counts, multipliers, layout, data fingerprints, tokenizer, launches
tokenizer.json  the tokenizer of the data, if known, and its accompanying files
metrics.jsonl   one row for each recorded step
expert_load.jsonl  each expert's share of tokens at the same steps, by layer (mixtures of experts)
plans.jsonl     assignment of documents to ranks at the same steps (data.kind: documents)
scores.jsonl    results of evaluations of the run's checkpoints, if any
events.jsonl    events with their times
logs/           each rank's log of a hung run (trainer/watch)
tb/             TensorBoard
pins/           other runs that branch from checkpoints of this run
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
"""Error numbers of a full disk or an exhausted quota."""
RETRY_AFTER_S = (0.5, 2.0)
"""Pauses before the retries of a small file for which the disk was full."""
_ABANDONED_S = 3600.0
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")
_LONGEST_NAME = 100


def write_atomically(path: Path, text: str) -> None:
    """Replace the contents of ``path`` by ``text``; readers see the old or the new file, complete.

    If the disk is full, the write is retried ``len(RETRY_AFTER_S)`` times.

    Raises:
        OSError: the file cannot be written; ``path`` is unchanged.
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
    """Paths of a run, and the lock that excludes a second live run."""

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
        self._made: list[Path] = []  # created by ``claim``, the deepest first
        self._written: list[Path] = []  # files that did not exist before ``claim``

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log, which is created with its first message."""
        return self.path / "logs" / f"rank-{rank}.log"

    def claim(self) -> None:
        """Create the folder and lock it until ``release`` or the end of the process.

        Raises UserError if another live process has the lock or the folder cannot be created.
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
        """Release the lock, so that another run can use the folder."""
        if self._lock is not None:
            with suppress(OSError):  # the lock's text could not be written: the disk is full
                self._lock.close()
            self._lock = None

    def recorded(self) -> dict[str, Any]:
        """Return the contents of run.json; empty before the first launch.

        Raises:
            UserError: run.json cannot be read.
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
        """Return the name in the ``latest`` pointer; None before the first save.

        Raises:
            UserError: the pointer cannot be read.
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
        """Return ``{"origin": ...}`` from run.json for a run with imported weights, else {}."""
        return {key: value for key, value in self.recorded().items() if key == "origin"}

    def withdraw(self) -> None:
        """Release the lock, and restore the folder to its state before ``claim`` if no run began.

        A run begins when run.json is written; a launch refused earlier removes its own files. The
        log folder of a hung launch is kept.
        """
        begun = self.run.exists() or self.log(0).parent.exists()
        if self._lock is not None and not begun and self.config in self._written:
            for file in self._written:
                file.unlink(missing_ok=True)
            if self.checkpoints in self._made:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            (self.path / "run.lock").unlink(missing_ok=True)
            with suppress(OSError):  # another process has added files
                for place in self._made:
                    if place != self.checkpoints:
                        place.rmdir()
        self.release()

    def is_new(self) -> bool:
        """Return True if no run was ever started here."""
        return not self.config.exists()

    def check_config_is_there(self, first_step: int) -> None:
        """Raise UserError if a run's config.yaml is missing, since the run would start again.

        ``first_step``: step of the checkpoint that an interrupted start from another run leaves.
        """
        names = {path.name for path in self.checkpoints.glob("step-*")} - {f"step-{first_step}"}
        if not self.config.exists() and (self.run.exists() or names):
            raise UserError(
                f"run.folder={self.path} holds a run, but its config.yaml is gone; restore it, or "
                "choose another run.folder to begin anew"
            )

    def remove_temporary(self) -> list[str]:
        """Remove the files of interrupted atomic writes; return their names.

        The lock must be taken. Files that other processes write too (scores, pins) may be in use;
        they are removed when they have not changed for an hour.
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
        """Remove metrics rows past ``step``, which will be recomputed; return their number.

        An incomplete last line, left by a crash, is removed as well.
        """
        _cut(self.loads, step)
        _cut(self.plans, step)
        _cut(self.scores, step)
        return _cut(self.metrics, step)


def _cut(path: Path, step: int) -> int:
    """Remove the rows of ``path`` past ``step``; return their number."""
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
