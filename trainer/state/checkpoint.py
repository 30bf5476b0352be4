"""Saving and loading a run's state with torch's distributed checkpoint files.

A checkpoint is a folder ``checkpoints/step-N``: DCP shards (any layout reads what any layout
wrote), ``trainer.json`` (step, data position, ledger, areas: what is not a tensor) and, written
last, ``complete.json`` with the size and CRC-32 of every other file. It is written as
``.step-N.partial`` and renamed when complete, so a crash leaves either a whole checkpoint or a
folder that nothing reads.
"""

from __future__ import annotations

import json
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
)

from allometry.configs.errors import UserError
from allometry.configs.execution import CheckpointConfig
from allometry.parallel.mesh import Mesh
from allometry.trainer.state.folder import RunFolder, write_atomically

COMPLETE = "complete.json"
FACTS = "trainer.json"
State = dict[str, Tensor]


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def saved(folder: RunFolder) -> list[Path]:
    """The checkpoint folders of a run, oldest first, complete or not."""
    found = [p for p in folder.checkpoints.glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=step_of)


def damage(path: Path, *, contents: bool) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole.

    Sizes are always compared; with ``contents`` every byte is read and its checksum compared.
    """
    try:
        listed = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{COMPLETE} is missing: it was never finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{COMPLETE} cannot be read"
    for name, facts in listed.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
        if contents and checksum(file) != facts["crc32"]:
            return f"{name} has changed since it was written"
    return None


def choose(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint to continue from, whole to the last byte; None to start from nothing.

    ``resume`` is ``auto`` (what ``latest`` names, else the newest) or ``step-N``. Raises UserError
    for one that is absent or damaged, naming the newest that is whole: a run that has saved is
    never begun again from nothing.
    """
    there = saved(folder)
    names = ", ".join(path.name for path in there) or "none"
    if resume != "auto":
        chosen = folder.checkpoints / resume
        if chosen not in there:
            raise UserError(
                f"run.resume={resume}: {folder.path} has no such checkpoint; it has {names}"
            )
    else:
        named = _latest(folder)
        if named is None and not there:
            return None
        chosen = folder.checkpoints / named if named else there[-1]
    problem = "it is gone" if chosen not in there else damage(chosen, contents=True)
    if problem is None:
        return chosen
    others = [p for p in reversed(there) if p != chosen]
    whole = next((p for p in others if damage(p, contents=True) is None), None)
    remedy = (
        f"the newest complete one is {whole.name}: continue there with run.resume={whole.name}"
        if whole
        else "there is no complete one in this folder: restore it, or choose another run.folder"
    )
    raise UserError(f"checkpoint {chosen} is damaged ({problem}); {remedy}")


def _latest(folder: RunFolder) -> str | None:
    """The name in the ``latest`` pointer; None if nothing was ever saved."""
    try:
        return folder.latest.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def abandon_after(folder: RunFolder, step: int) -> list[str]:
    """Set aside the checkpoints past ``step``, to which the run goes back; their new names."""
    moved = []
    for path in saved(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            moved.append(aside.name)
    return moved


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
    return facts


def seal(path: Path, step: int, files: dict[str, Any], facts: dict[str, Any]) -> None:
    """Make a checkpoint of a folder of DCP shards: add the facts and, last, the list of files.

    ``files``: bytes and CRC-32 of each shard by its name.
    """
    write_atomically(path / FACTS, json.dumps(facts, indent=2) + "\n")
    for name in (FACTS, ".metadata"):
        files[name] = {"bytes": (path / name).stat().st_size, "crc32": checksum(path / name)}
    content = {"step": step, "files": dict(sorted(files.items()))}
    write_atomically(path / COMPLETE, json.dumps(content, indent=2) + "\n")


def load(path: Path, state: State, mesh: Mesh) -> None:
    """Fill the tensors of ``state`` in place, whatever layout wrote the checkpoint."""
    dcp.load(state, storage_reader=FileSystemReader(path), process_group=mesh.checkpoint_group)


class Checkpointer:
    """Saves checkpoints while training goes on, and keeps the ones that were asked for.

    A save that fails (a full disk, say) is reported through ``report(event, details)`` and leaves
    the previous checkpoint as it was.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        mesh: Mesh,
        report: Callable[..., None],
    ) -> None:
        self._folder = folder
        self._config = config
        self._mesh = mesh
        self._report = report
        self._worker: threading.Thread | None = None
        self._outcome: tuple[int, str | None] | None = None

    def due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint at ``step``."""
        every = self._config.every_steps
        return step in self._config.keep_steps or (every is not None and step % every == 0)

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Begin to save; returns as soon as the tensors are copied. A save under way ends first."""
        self.wait()
        partial = self._folder.checkpoints / f".step-{step}.partial"
        failure = self._prepare(partial)
        if failure is not None:
            self._outcome = (step, failure)
            self.poll()
            return
        writer = FileSystemWriter(partial, sync_files=True, overwrite=True)
        group = self._mesh.checkpoint_group
        staged = dcp.async_save(state, storage_writer=writer, process_group=group)
        self._worker = threading.Thread(
            target=self._complete, args=(step, partial, staged, facts), name=f"save-step-{step}"
        )
        self._worker.start()
        if not self._config.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Report a save that has ended since the last call."""
        if self._worker is not None and not self._worker.is_alive():
            self._worker.join()
            self._worker = None
        if self._worker is None and self._outcome is not None:
            step, failure = self._outcome
            self._outcome = None
            if failure is None:
                self._report("checkpoint_saved", step=step)
            else:
                self._report("checkpoint_failed", step=step, reason=failure)

    def wait(self) -> None:
        """Until no save is under way."""
        if self._worker is not None:
            self._worker.join()
        self.poll()

    def _prepare(self, partial: Path) -> str | None:
        """Make the empty folder on the main rank; every rank learns whether that worked."""
        failure = None
        if self._mesh.is_main:
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            except OSError as error:
                failure = str(error)
        outcome = [failure]
        dist.broadcast_object_list(outcome, src=0, group=self._mesh.checkpoint_group)
        return outcome[0]

    def _complete(self, step: int, partial: Path, staged: Any, facts: dict[str, Any]) -> None:
        """In the background: wait for the shards, add what makes them a checkpoint, rename."""
        mine: dict[str, Any] = {}
        failure: str | None = None
        try:
            staged.result()
            for file in partial.glob(f"__{dist.get_rank()}_*.distcp"):
                mine[file.name] = {"bytes": file.stat().st_size, "crc32": checksum(file)}
        except (Exception, CheckpointException) as error:  # the run must go on
            failure = _reason(error)
        group = self._mesh.checkpoint_group
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (failure, mine), group=group)
        failure = next((reason for reason, _ in gathered if reason), None)
        if self._mesh.is_main:
            files = {name: entry for _, shard in gathered for name, entry in shard.items()}
            if failure is None:
                failure = self._finish(step, partial, files, facts)
            if failure is not None:
                shutil.rmtree(partial, ignore_errors=True)
        self._outcome = (step, failure)

    def _finish(
        self, step: int, partial: Path, files: dict[str, Any], facts: dict[str, Any]
    ) -> str | None:
        final = self._folder.checkpoints / f"step-{step}"
        try:
            seal(partial, step, files, facts)
            if final.exists():  # the run went back and passes this step again
                old = final.with_name(f".{final.name}.replaced")
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
                partial.rename(final)
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(final)
            write_atomically(self._folder.latest, final.name + "\n")
            self._prune(step)
        except OSError as error:
            return _reason(error)
        return None

    def _prune(self, step: int) -> None:
        past = [p for p in saved(self._folder) if step_of(p) <= step]
        every = self._config.keep_every_steps
        for path in past[: -self._config.keep_last]:
            if step_of(path) in self._config.keep_steps:
                continue
            if every is None or step_of(path) % every:
                # The marker goes first: a crash while deleting must not leave a "complete" half.
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The cause at the bottom of DCP's nested exceptions, in one line."""
    failures = getattr(error, "failures", None)
    if failures:
        first = next(iter(failures.values()))
        error = first[0] if isinstance(first, tuple) else first
    return f"{type(error).__name__}: {error}".split("\n")[0]


def clean(folder: RunFolder) -> list[str]:
    """Remove what an interrupted save left behind; the names removed."""
    left = [*folder.checkpoints.glob(".step-*.partial"), *folder.checkpoints.glob(".*.replaced")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> State:
    """An optimizer's tensors under ``optimizer.<parameter>.<key>``."""
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
