"""Save and load a run's state in torch's distributed checkpoint (DCP) format.

A checkpoint is a folder ``checkpoints/step-N``: DCP shards (readable in any layout),
``trainer.json`` (step, data position, ledger, areas: all state without tensors) and, written last,
``complete.json`` with the size and checksums of every other file (``integrity.py``). The folder is
written as ``.step-N.partial`` and renamed, so a crash leaves a complete checkpoint or a folder that
is never read.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from allometry.configs.checkpoints import CheckpointConfig
from allometry.configs.errors import UserError
from allometry.configs.json_file import parse_object
from allometry.laws.runs import read_lines
from allometry.optim.build import Elsewhere
from allometry.optim.offload.held import MASTER, Stored
from allometry.parallel.agree import wait_for_all, with_heartbeat
from allometry.parallel.mesh import Mesh
from allometry.trainer.state.facts import check_facts
from allometry.trainer.state.failure import Failure
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.identity import problem_of
from allometry.trainer.state.integrity import (
    COMPLETE,
    FACTS,
    Files,
    ShardWriter,
    seal,
)
from allometry.trainer.state.pins import pins
from allometry.trainer.state.planners import Loading, Saving, State, layouts
from allometry.trainer.state.room import due, free_bytes, megabytes, stays
from allometry.trainer.state.shards import ShardReader, refusal_in
from allometry.trainer.state.verified import VerifiedFiles


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name, such as 120 for ``step-120``."""
    return int(path.name.removeprefix("step-"))


def saved(folder: RunFolder) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, complete or not."""
    folders = [p for p in folder.checkpoints.glob("step-*") if p.name[5:].isdigit()]
    return sorted(folders, key=step_of)


def choose(folder: RunFolder, resume: str) -> Path | None:
    """Return the checkpoint to continue from, checked by file sizes; None for a new run.

    ``resume`` is ``auto`` (the name in ``latest``, else the newest) or ``step-N``. Shards are not
    opened; ``integrity.damage_of_contents`` reads them on all ranks. Raises UserError for a missing
    or damaged checkpoint: a run with saved checkpoints is never restarted from step 0.
    """
    there = saved(folder)
    if not there and _has_saved(folder):
        raise UserError(
            f"{folder.path} has saved checkpoints (events.jsonl), and all of them are gone; "
            "restore one, or choose another run.folder to begin anew"
        )
    if resume != "auto":
        chosen = folder.checkpoints / resume
        if chosen not in there:
            names = ", ".join(path.name for path in there) or "none"
            raise UserError(
                f"run.resume={resume}: {folder.path} has no such checkpoint; it has {names}"
            )
    else:
        named = folder.read_latest()
        if named is None and not there:
            return None
        if named is not None and not re.fullmatch(r"step-\d+", named):
            raise UserError(
                f"{folder.latest} does not name a checkpoint; write one of these into it: "
                + (", ".join(path.name for path in there) or "none is left")
            )
        chosen = folder.checkpoints / named if named else there[-1]
    problem = "it is gone" if chosen not in there else problem_of(folder, chosen)
    if problem is not None:
        raise damaged(folder, chosen, problem)
    return chosen


def damaged(folder: RunFolder, path: Path, problem: str) -> UserError:
    """Return the error about a damaged checkpoint, which names the newest other complete one.

    Only the file sizes of the other checkpoint are checked here; its contents are checked when the
    run resumes from it.
    """
    others = [other for other in reversed(saved(folder)) if other != path]
    whole = next((other for other in others if problem_of(folder, other) is None), None)
    remedy = (
        f"the newest complete one is {whole.name}: continue there with run.resume={whole.name}"
        if whole
        else "there is no complete one in this folder: restore it, or choose another run.folder"
    )
    return UserError(f"checkpoint {path} is damaged ({problem}); {remedy}")


def unwritable(folder: RunFolder, error: OSError) -> UserError:
    """Return the error of a launch with an unwritable folder, which names the latest checkpoint."""
    name = folder.read_latest()
    kept = f"; {name} is kept, from which the same command goes on" if name else ""
    return UserError(
        f"run.folder={folder.path} cannot be written: {error.strerror or error}; free space there "
        f"or mend that, then run again{kept}"
    )


def _has_saved(folder: RunFolder) -> bool:
    """Return True if the run has recorded a saved checkpoint."""
    events = read_lines(folder.events)
    return any(event.get("event") == "checkpoint_saved" for event in events)


def abandon_after(folder: RunFolder, step: int) -> list[str]:
    """Rename the checkpoints past ``step``, where the run continues; return their new names."""
    moved = []
    for path in saved(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            moved.append(aside.name)
    return moved


def read_facts(path: Path) -> dict[str, Any]:
    """Return the facts of a checkpoint (all state that is not a tensor).

    Raises:
        UserError: the facts cannot be read, are invalid, or belong to another step.
    """
    files = VerifiedFiles(path)
    text = files.whole(FACTS)
    try:
        facts = parse_object(text)
        check_facts(facts, path)
    except ValueError as error:
        raise files.unreadable(FACTS, error) from None
    return facts


def names(path: Path) -> set[str]:
    """Return the names of the tensors in a checkpoint."""
    return set(ShardReader(path).read_metadata().state_dict_metadata)


def load(path: Path, state: State, mesh: Mesh) -> None:
    """Load a checkpoint of any layout into ``state``; a UserError of one rank is raised on all."""

    def read() -> None:
        tensors, planner = layouts(state), Loading(state)
        reader, group = ShardReader(path), mesh.checkpoint_group
        try:
            dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)
        except CheckpointException as error:
            refusal = refusal_in(error)
            if refusal is not None:
                raise refusal from None
            first = next(failure for failure, _ in error.failures.values())
            raise UserError(
                f"checkpoint {path} cannot be loaded ({_line(first)}); it is damaged or of "
                "another model: use another one"
            ) from error

    with_heartbeat(mesh, read, f"loading {path.name}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class Checkpointer:
    """Saves checkpoints in the background of training, and removes old ones.

    ``needed_bytes`` is the approximate size of a checkpoint; ``run`` the run's identity. A failed
    save is reported by ``report(event, details)`` on every rank, with the system's reason, and
    leaves the newest checkpoint intact. If the disk is full, older checkpoints that this save would
    have replaced are removed, to make room for the next save.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: CheckpointConfig,
        mesh: Mesh,
        report: Callable[..., None],
        needed_bytes: int,
        run: str | None = None,
    ) -> None:
        self._folder, self._run = folder, run
        self._needed_bytes = needed_bytes
        self._config = config
        self._mesh = mesh
        self._report = report
        self._worker: threading.Thread | None = None
        self._outcome: tuple[int, str | None] | None = None

    def due(self, step: int) -> bool:
        """Return True if the config requests a checkpoint at ``step``."""
        return due(self._config, step)

    def save(self, step: int, state: State, facts: dict[str, Any]) -> None:
        """Begin to save; return once the tensors are staged. An earlier save is completed first."""
        self.wait()
        partial = self._folder.checkpoints / f".step-{step}.partial"
        failure = self._prepare(step, partial)
        if failure is not None:
            self._outcome = (step, failure)
            self.poll()
            return
        writer = ShardWriter(partial)
        stored = {name: value for name, value in state.items() if isinstance(value, Stored)}
        near = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        copy: State = {**writer.stage(near), **stored}
        self.begin(lambda: self._write(step, writer, copy, facts), f"save-{step}")
        if stored or not self.asynchronous:  # ``Stored`` tensors are not staged
            self.wait()

    def begin(self, work: Callable[[], None], name: str) -> None:
        """Run ``work`` in the background, where it may use ``mesh.checkpoint_group``.

        Every rank calls this, after ``wait``.
        """
        assert self._worker is None or not self._worker.is_alive()
        # A daemon thread, so that the process can exit if other ranks have died.
        self._worker = threading.Thread(target=work, name=name, daemon=True)
        self._worker.start()

    @property
    def asynchronous(self) -> bool:
        """True if training continues during a write."""
        return self._config.asynchronous

    @property
    def busy(self) -> bool:
        """True while this rank is writing."""
        return self._worker is not None and self._worker.is_alive()

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
                needed = self._needed_bytes
                self._report("checkpoint_failed", step=step, reason=failure, needed_bytes=needed)

    def wait(self) -> None:
        """Wait until no rank is saving; every rank calls this."""
        if self._mesh.world_size > 1:
            wait_for_all(self._mesh, self.join, "saving a checkpoint")
        else:
            self.join()
        self.poll()

    def join(self, seconds: float | None = None) -> bool:
        """Wait at most ``seconds`` for this rank's save; return True if no save is running."""
        if self._worker is not None:
            self._worker.join(seconds)
        return self._worker is None or not self._worker.is_alive()

    def _prepare(self, step: int, partial: Path) -> str | None:
        """Create the empty folder on the main rank; return a failure's reason on every rank."""
        mesh = self._mesh

        def make() -> str | None:
            try:
                if mesh.is_main:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
            except OSError as error:
                return self._failed(step, Failure.of(error))
            return None

        return mesh.broadcast_object(with_heartbeat(mesh, make, f"preparing {partial.name}"))

    def _write(self, step: int, writer: ShardWriter, state: State, facts: dict[str, Any]) -> None:
        """Write the shards in the background, seal the checkpoint, and rename the folder."""
        group = self._mesh.checkpoint_group
        failure: Failure | None = None
        try:
            planner = Saving(state)
            dcp.save(layouts(state), storage_writer=writer, planner=planner, process_group=group)
        except (Exception, CheckpointException) as error:  # the run must continue
            failure = Failure.of(error)
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, (failure, writer.files), group=group)
        failure = next((reason for reason, _ in gathered if reason), None)
        told: list[str | None] = [None]
        if self._mesh.is_main:
            partial = Path(writer.path)
            if failure is None:
                files = {name: entry for _, shards in gathered for name, entry in shards.items()}
                failure = self._finish(step, partial, files, facts)
            if failure is not None:
                shutil.rmtree(partial, ignore_errors=True)
                told[0] = self._failed(step, failure)
        dist.broadcast_object_list(told, src=0, group=group)
        self._outcome = (step, told[0])

    def _finish(
        self, step: int, partial: Path, files: Files, facts: dict[str, Any]
    ) -> Failure | None:
        final = self._folder.checkpoints / f"step-{step}"
        try:
            seal(partial, step, files, facts, run=self._run)
            if final.exists():  # the run was rewound and passes this step again
                old = final.with_name(f".{final.name}.replaced")
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
                partial.rename(final)
                shutil.rmtree(old, ignore_errors=True)
            else:
                partial.rename(final)
            write_atomically(self._folder.latest, final.name + "\n")
            self._prune(step, self._config.keep_last)
        except OSError as error:
            return Failure.of(error)
        return None

    def _failed(self, step: int, failure: Failure) -> str:
        """Return the failure as text; if the disk is full, remove old checkpoints."""
        if not failure.full:
            return failure.reason
        free = free_bytes(self._folder.checkpoints)
        with suppress(OSError):
            self._prune(step - 1, max(1, self._config.keep_last - 1))
        left = "" if free is None else f", and {megabytes(free)} were free"
        return f"{failure.reason}: a checkpoint takes {megabytes(self._needed_bytes)}{left}"

    def _prune(self, step: int, keep: int) -> None:
        """Remove those up to ``step`` but the newest ``keep``, ``latest``, kept and pinned ones."""
        latest = self._folder.read_latest()
        past = [p for p in saved(self._folder) if step_of(p) <= step]
        pinned = {pin.step for pin in pins(self._folder.path)}
        for path in past[:-keep]:
            kept = stays(self._config, step_of(path)) or step_of(path) in pinned
            if not kept and path.name != latest:
                # The marker is removed first, so that a crash cannot leave a partial but "complete"
                # folder.
                (path / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def clean(folder: RunFolder, used: Path | None) -> list[str]:
    """Remove the files of interrupted saves except ``used``; return the names of the folders."""
    folder.remove_temporary()
    patterns = (".step-*.partial", ".*.replaced", ".upload-step-*")
    left = [path for pattern in patterns for path in folder.checkpoints.glob(pattern)]
    left = [path for path in left if path != used]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in left]


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> State:
    """Return an optimizer's tensors as ``optimizer.<parameter>.<key>``; waits for pending work.

    Parameters that the optimizer stores are returned too, as ``model.<parameter>``.
    """
    stored: Iterable[tuple[Tensor, str, Stored]] = ()
    if isinstance(optimizer, Elsewhere):
        stored = optimizer.stored()
    away: State = {
        f"model.{names[p]}" if key == MASTER else f"optimizer.{names[p]}.{key}": value
        for p, key, value in stored
    }
    return away | {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
