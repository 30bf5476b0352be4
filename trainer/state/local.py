"""Local copies of a run's state on its nodes: quick to write, and lost with their node.

A rank's copy is a checkpoint of its own tensors alone, in the format of ``checkpoint.py`` with its
checksums: ``<checkpoint.local.folder>/allometry-<user>-<run>/rank-<keeper>/of-<owner>/step-N``. A
rank keeps its own copy and, with ``replicate``, the copy of a rank on the previous node. A set is
complete if it has a copy of every rank, of one step and one launch; only a launch with the same
layout and world size reads it (``local_choice.py``). Copies are temporary: the last state of a
launch is always saved as a checkpoint in the run's folder, and no file refers to a copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from allometry.configs.checkpoints import LocalCopies as LocalConfig
from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.optim.offload.held import Stored
from allometry.parallel.deepspeed.boxes import Stretch
from allometry.parallel.mesh import Mesh, local
from allometry.scaling.plan import RunPlan
from allometry.trainer.state.failure import Failure
from allometry.trainer.state.integrity import ShardWriter, damage, seal
from allometry.trainer.state.planners import Loading, Saving, State, layouts
from allometry.trainer.state.shards import ShardReader, refusal_in
from allometry.trainer.state.transfer import Parcel, exchange, files_of

COPY = "copy"
"""Key that ``trainer.json`` of a copy has in addition to the keys of a checkpoint."""


class Copied(NamedTuple):
    """Result of the newest copy, the same on all ranks; ``failure`` is None for a complete set.

    ``lacking``: ranks whose replica could not be written.
    """

    step: int
    seconds: float
    nbytes: int
    failure: str | None
    lacking: list[int]


def layout_key(config: RunConfig, plan: RunPlan) -> str:
    """Return a hash shared by launches whose ranks own the same parts of the same tensors."""
    parallel = config.parallel.model_dump(mode="json", exclude={"timeout_s", "auto"})
    content = {
        "world_size": plan.world_size,
        "parallel": parallel,
        "layout": plan.layout.describe(),
        "model": config.model.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class LocalCopies:
    """This rank's local copies of a run.

    ``key``: see ``layout_key``; ``node_ranks``: number of ranks on each node.
    """

    def __init__(
        self, config: LocalConfig, run: Path, key: str, mesh: Mesh, node_ranks: int
    ) -> None:
        name = hashlib.sha256(os.fsencode(run.resolve())).hexdigest()[:16]
        self.folder = Path(config.folder) / f"allometry-{os.getuid()}-{name}"
        self.key = key
        self.mesh = mesh
        self._shift = node_ranks if node_ranks < mesh.world_size else 1
        self._replicate = config.replicate and mesh.world_size > 1
        self._buffers: dict[str, Tensor] = {}
        self.outcome: Copied | None = None

    @property
    def place(self) -> Path:
        """Folder of the copies that this rank keeps."""
        return self.folder / f"rank-{self.mesh.rank}"

    def copy_of(self, owner: int, step: int) -> Path:
        """Return the path of the copy of ``owner`` that this rank keeps."""
        return self.place / f"of-{owner}" / f"step-{step}"

    @classmethod
    def of(cls, config: RunConfig, plan: RunPlan, mesh: Mesh) -> LocalCopies | None:
        """Return the local copies of a run, None if it has none; every rank calls this.

        Ranks on a node must be consecutive, and all nodes must have the same number of ranks.
        """
        wanted = config.checkpoint.local
        if wanted is None:
            return None
        hosts = mesh.gather_objects(socket.gethostname())
        node_ranks = max(map(hosts.count, hosts))
        return cls(wanted, Path(config.run.folder), layout_key(config, plan), mesh, node_ranks)

    def make(self) -> None:
        """Create the run's folder on this node.

        Raises:
            UserError: the folder cannot be created, or other users can write to it.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            found = self.folder.lstat()
            self.place.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoint.local.folder={self.folder.parent} cannot be written "
                f"({error.strerror}); name another folder, or set checkpoint.local: null"
            ) from None
        if not self.is_ours(found):
            raise UserError(
                f"checkpoint.local.folder: {self.folder} is not a folder of this user alone; "
                "remove it, or name another folder"
            )

    @staticmethod
    def is_ours(found: os.stat_result) -> bool:
        """Return True for a directory of this user that no other user can write to."""
        private = not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and private

    def staged(self, state: State) -> State:
        """Copy this rank's tensors into reusable host buffers; ``Stored`` tensors stay.

        No write may be running. On CUDA the copies are queued and synchronized once.
        """
        copied: State = {}
        for name, value in here(state).items():
            if isinstance(value, Stored):
                copied[name] = value
                continue
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                pinned = value.device.type == "cuda"
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
                self._buffers[name] = buffer
            copied[name] = buffer.copy_(value, non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return copied

    def write(self, step: int, state: State, facts: dict[str, Any], launch: str, run: str) -> None:
        """Write this rank's copy and send it to the next node, in the background of every rank.

        ``launch``: name of the launch (``local_choice.launch_name``); ``run``: the run's identity.
        """
        told = {"rank": self.mesh.rank, "launch": launch, "layout": self.key}
        try:
            self.outcome = self._write(step, state, {**facts, COPY: told}, run)
        except Exception as error:  # another rank has died, which the run will detect itself
            self.outcome = Copied(step, 0.0, 0, Failure.of(error).reason, [])

    def _write(self, step: int, state: State, facts: dict[str, Any], run: str) -> Copied:
        begun = time.monotonic()
        failure, files = None, list[tuple[str, int]]()
        mine = self.copy_of(self.mesh.rank, step)
        try:
            self._write_own(mine, step, state, facts, run)
            files = files_of(mine)
        except (Exception, CheckpointException) as error:  # the run must continue
            failure = Failure.of(error).reason
        answers = self._gathered((failure, files))
        failure = next((reason for reason, _ in answers if reason), None)
        lacking: list[int] = []
        if failure is None:
            if self._replicate:
                reasons = self._gathered(self._swap(step, [each for _, each in answers]))
                lacking = [rank for rank, reason in enumerate(reasons) if reason]
            self.forget(but=step)
        else:
            shutil.rmtree(mine, ignore_errors=True)
        nbytes = sum(size for _, size in files)
        return Copied(step, time.monotonic() - begun, nbytes, failure, lacking)

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [value] * self.mesh.world_size
        if self.mesh.world_size > 1:
            dist.all_gather_object(found, value, group=self.mesh.checkpoint_group)
        return found

    def _write_own(
        self, path: Path, step: int, state: State, facts: dict[str, Any], run: str
    ) -> None:
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        name = not_finite(state)
        if name is not None:
            raise ValueError(f"{name} is not finite")
        try:
            partial.mkdir(parents=True)
            writer = ShardWriter(partial)
            dcp.save(layouts(state), storage_writer=writer, planner=Saving(state), no_dist=True)
            seal(partial, step, writer.files, facts, run=run)
            partial.rename(path)
        except (Exception, CheckpointException):
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _swap(self, step: int, files: list[list[tuple[str, int]]]) -> str | None:
        """Send this rank's copy to the next node, keep that of the previous; return a failure."""
        rank, count = self.mesh.rank, self.mesh.world_size
        after, before = (rank + self._shift) % count, (rank - self._shift) % count
        sent = Parcel(after, self.copy_of(rank, step), files[rank])
        return self.receive(sent, before, step, before, files[before])

    def send(self, sent: Parcel) -> None:
        """Send a copy to a rank that calls ``receive``."""
        exchange(self.mesh.checkpoint_group, sent, None)

    def receive(
        self, sent: Parcel | None, owner: int, step: int, peer: int, files: list[tuple[str, int]]
    ) -> str | None:
        """Send a copy, if any, and keep a copy of ``owner`` sent by ``peer``; return a failure."""
        path = self.copy_of(owner, step)
        partial = path.with_name(f".{path.name}.partial")
        for old in (partial, path):
            shutil.rmtree(old, ignore_errors=True)
        error = exchange(self.mesh.checkpoint_group, sent, Parcel(peer, partial, files))
        try:
            if error is not None:
                raise error
            problem = damage(partial, contents=True)
            if problem is not None:
                raise ValueError(problem)
            partial.rename(path)
        except (OSError, ValueError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            return Failure.of(error).reason
        return None

    def forget(self, but: int | None = None) -> None:
        """Remove this rank's copies, including incomplete ones, except for step ``but``."""
        for path in [*self.place.glob("of-*/step-*"), *self.place.glob("of-*/.step-*")]:
            if path.name != f"step-{but}":
                shutil.rmtree(path, ignore_errors=True)

    def settle(self, step: int | None) -> None:
        """Keep only the copies of ``step`` after a launch has loaded them; None removes all.

        Folders of ranks beyond the world size of this launch are removed, too.
        """
        self.forget(but=step)
        for path in self.folder.glob("rank-*"):
            number, count = path.name.removeprefix("rank-"), self.mesh.world_size
            mine = number.isdecimal() and int(number) % count == self.mesh.rank
            if mine and int(number) >= count:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove all files of this rank once its state is saved elsewhere."""
        shutil.rmtree(self.place, ignore_errors=True)
        try:
            self.folder.rmdir()  # succeeds on the last rank of a node
        except OSError:
            return


def here(state: State) -> State:
    """Return this rank's part of each tensor, in the same memory."""
    parts: State = {}
    for name, value in state.items():
        if not isinstance(value, Stored):
            parts[name] = local(value.detach())
        elif isinstance(value.like, Stretch):
            flat = torch.zeros(()).expand(value.like.stop - value.like.start)
            parts[name] = value._replace(like=flat)
        else:
            parts[name] = value._replace(like=local(value.like))
    return parts


def not_finite(state: State) -> str | None:
    """Return the name of a tensor in memory with an infinity or NaN; None if all are finite."""
    for name, value in state.items():
        floats = isinstance(value, Tensor) and value.dtype.is_floating_point and value.itemsize > 1
        if floats and not bool(value.isfinite().all()):
            return name
    return None


def load_copy(path: Path, state: State) -> None:
    """Load this rank's copy in ``path`` into the tensors of ``state``.

    Raises:
        UserError: the copy contains other tensors.
    """
    parts = here(state)
    try:
        dcp.load(
            layouts(parts), storage_reader=ShardReader(path), planner=Loading(parts), no_dist=True
        )
    except (CheckpointException, ValueError, RuntimeError) as error:
        refusal = refusal_in(error) if isinstance(error, CheckpointException) else error
        if isinstance(refusal, UserError):
            raise refusal from None
        raise UserError(
            f"the local copy {path} does not fit this run ({Failure.of(error).reason}); remove it "
            "and run again, which goes on from the newest checkpoint"
        ) from None
