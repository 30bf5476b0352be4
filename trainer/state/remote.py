"""Store checkpoints in object stores through fsspec.

``<url>/step-N/`` contains the files of a checkpoint and, in ``record/``, the files of the run's
folder at the time of the save. ``upload.json``, which lists all files with their sizes, is written
last and removed first: an upload without it is ignored.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from allometry.configs.errors import UserError
from allometry.configs.json_file import MOST_BYTES, parse_object
from allometry.data.tokenizer import BESIDE, TOKENIZER
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.integrity import COMPLETE, damage

LISTED = "upload.json"
RECORD = "record"
RECORDS = (
    *("config.yaml", "run.json", "metrics.jsonl", "events.jsonl", "expert_load.jsonl"),
    *("plans.jsonl", "scores.jsonl", TOKENIZER, *BESIDE),
)
"""Files of a run's folder that are uploaded with a checkpoint."""
_PIECE_BYTES = 16 << 20


class Store(NamedTuple):
    """A run's location in an object store."""

    url: str
    fs: Any  # fsspec's AbstractFileSystem
    root: str

    @classmethod
    def of(cls, url: str, key: str) -> Store:
        """Return the location ``url``; ``key`` is the config key that contains it, for messages.

        Raises:
            UserError: fsspec does not support the URL, or a required package is not installed.
        """
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{key}={url} cannot be used ({reason}); correct it") from None
        return cls(url, fs, root.rstrip("/"))

    def at(self, step: int, *names: str) -> str:
        """Return the path of an object of a step."""
        return "/".join((self.root, f"step-{step}", *names))

    def steps(self) -> list[int]:
        """Return the steps with complete uploads, the oldest first."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        last = [str(path).rstrip("/").rpartition("/")[2] for path in found]
        steps = sorted(int(name[5:]) for name in last if re.fullmatch(r"step-\d+", name))
        return [step for step in steps if self.fs.exists(self.at(step, LISTED))]

    def put(self, step: int, files: list[Local]) -> None:
        """Upload files, and then their list.

        Raises OSError, or an exception of the store's client.
        """
        self.remove(step)  # left by an interrupted upload, or from before a rewind
        self.fs.makedirs(self.at(step, RECORD), exist_ok=True)
        listed = {}
        for file in files:
            listed[file.name] = self._put(self.at(step, file.name), file)
        text = json.dumps({"version": 1, "step": step, "files": listed}, indent=2) + "\n"
        self.fs.pipe_file(self.at(step, LISTED), text.encode())

    def _put(self, there: str, file: Local) -> dict[str, int]:
        crc, left = 0, file.nbytes
        with open(file.path, "rb") as source, self.fs.open(there, "wb") as target:
            while left and (data := source.read(min(_PIECE_BYTES, left))):
                target.write(data)
                crc, left = zlib.crc32(data, crc), left - len(data)
        if left or self.fs.info(there)["size"] != file.nbytes:
            raise OSError(f"{file.name} was not stored as a whole")
        return {"bytes": file.nbytes, "crc32": crc}

    def remove(self, step: int) -> None:
        """Remove an upload, its list first."""
        self.fs.invalidate_cache()
        if self.fs.exists(self.at(step, LISTED)):
            self.fs.rm_file(self.at(step, LISTED))
        if self.fs.exists(self.at(step)):
            self.fs.rm(self.at(step), recursive=True)


class Local(NamedTuple):
    """A file to upload: its first ``nbytes`` bytes, as ``name``."""

    name: str
    path: Path
    nbytes: int


def to_upload(folder: RunFolder, checkpoint: Path) -> Iterator[Local]:
    """Yield the files of a checkpoint and of its run's record, with their current sizes."""
    for path in sorted(checkpoint.iterdir()):
        yield Local(path.name, path, path.stat().st_size)
    for name in RECORDS:
        path = folder.path / name
        if path.is_file():
            yield Local(f"{RECORD}/{name}", path, path.stat().st_size)


def fetch(store: Store, folder: Path, step: int | None) -> int:
    """Download an upload into a new run folder; without ``step`` the newest complete upload.

    Returns:
        The step of the upload.

    Raises:
        UserError: ``folder`` exists, or the upload is missing or damaged.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name a folder that is not")
    partial = folder.with_name(f".{folder.name}.fetching")
    try:
        steps = store.steps()
        if not steps or (step is not None and step not in steps):
            there = ", ".join(f"step-{each}" for each in steps) or "none"
            asked = "" if step is None else f" of step {step}"
            raise UserError(f"{store.url} has no whole upload{asked}; it has {there}")
        step = steps[-1] if step is None else step
        shutil.rmtree(partial, ignore_errors=True)
        _download(store, partial, step)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"step {step} of {store.url} cannot be fetched ({error}); use another one or mend that"
        ) from None
    return step


def _download(store: Store, partial: Path, step: int) -> None:
    if store.fs.info(store.at(step, LISTED))["size"] > MOST_BYTES:
        raise ValueError(f"{LISTED} is too large")
    listed = parse_object(store.fs.cat_file(store.at(step, LISTED)))
    files = listed.get("files")
    if listed.get("step") != step or not isinstance(files, dict) or COMPLETE not in files:
        raise ValueError(f"{LISTED} is not that of step {step}")
    checkpoint = partial / "checkpoints" / f"step-{step}"
    checkpoint.mkdir(parents=True)
    for name, entry in files.items():
        part, _, record = name.partition("/")
        if record and (part != RECORD or record not in RECORDS):
            raise ValueError(f"{LISTED} names {name}")
        if not record and (Path(name).name != name or name in ("", ".", "..")):
            raise ValueError(f"{LISTED} names {name}")
        place = partial / record if record else checkpoint / name
        size, crc = 0, 0
        with store.fs.open(store.at(step, name), "rb") as source, open(place, "wb") as target:
            while data := source.read(_PIECE_BYTES):
                target.write(data)
                size, crc = size + len(data), zlib.crc32(data, crc)
        if entry != {"bytes": size, "crc32": crc}:
            raise ValueError(f"{name} has changed since it was uploaded")
    problem = damage(checkpoint, contents=False)
    if problem is not None:
        raise ValueError(problem)
    write_atomically(partial / "latest", checkpoint.name + "\n")
