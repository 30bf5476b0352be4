"""Upload checkpoints during training."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

from allometry.configs.checkpoints import CheckpointConfig
from allometry.parallel.agree import on_all_ranks, wait_for_all
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state.checkpoint import saved, step_of
from allometry.trainer.state.failure import Failure
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.state.remote import Store, to_upload
from allometry.trainer.state.room import stays

RETRY_AFTER_S = (1.0, 10.0)
"""Pauses before the retries of a failed upload."""


class Uploads(Callback):
    """Copies each complete checkpoint to an object store, on the main rank.

    Only one upload runs at a time; of the checkpoints saved meanwhile only the newest is uploaded
    next. A failed upload is reported as an event and does not end the run; the next checkpoint is
    uploaded as usual.
    """

    def __init__(
        self, config: CheckpointConfig, folder: RunFolder, mesh: Mesh, report: Callable[..., None]
    ) -> None:
        self._config, self._folder, self._mesh, self._report = config, folder, mesh, report
        assert config.upload is not None
        self._upload = config.upload
        self._store = Store.of(config.upload.url, "checkpoint.upload.url") if mesh.is_main else None
        self._worker: threading.Thread | None = None
        self._outcome: tuple[str, dict[str, Any]] | None = None
        self._next: int | None = None
        self._again = True  # True: also replace an existing upload

    @classmethod
    def of(
        cls, config: CheckpointConfig, folder: RunFolder, mesh: Mesh, report: Callable[..., None]
    ) -> Iterator[Uploads]:
        """Yield the uploads of a launch if the run requests them; every rank calls this."""
        if config.upload is not None:
            make = partial(cls, config, folder, mesh, report)
            yield on_all_ranks(mesh, make, "looking for checkpoint.upload.url")

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Begin with the newest checkpoint, whose upload may have been interrupted."""
        if there := saved(self._folder):
            self._next, self._again = step_of(there[-1]), False
            self._begin()

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind == "checkpoint_saved" and self._store is not None:
            self._next, self._again = details["step"], True
            self._begin()

    @override
    def between_steps(self, step: int, *, last: bool) -> None:
        self._poll()

    @override
    def finish(self) -> None:
        wait_for_all(self._mesh, self._ended, "uploading a checkpoint")

    @override
    def abort(self, seconds: float | None) -> None:
        if self._worker is not None:
            self._worker.join(seconds)
        self._poll()

    def _ended(self, seconds: float) -> bool:
        if self._worker is not None:
            self._worker.join(seconds)
        self._poll()
        return self._worker is None

    def _poll(self) -> None:
        """Report an ended upload, and begin the waiting one."""
        if self._worker is None or self._worker.is_alive():
            return
        self._worker.join()
        self._worker, outcome, self._outcome = None, self._outcome, None
        if outcome is not None:
            self._report(outcome[0], url=self._upload.url, **outcome[1])
        self._begin()

    def _begin(self) -> None:
        if self._worker is not None or self._next is None:
            return
        step, again, self._next = self._next, self._again, None
        # A daemon thread, so that the process can exit when the network is down.
        work = partial(self._work, step, again=again)
        self._worker = threading.Thread(target=work, name=f"upload-{step}", daemon=True)
        self._worker.start()

    def _work(self, step: int, *, again: bool) -> None:
        assert self._store is not None
        begun, failure = time.monotonic(), None
        links = self._folder.checkpoints / f".upload-step-{step}"
        for pause in (0.0, *RETRY_AFTER_S):
            time.sleep(pause)
            try:
                if not again and step in self._store.steps():
                    break
                files = list(to_upload(self._folder, self._linked(step, links)))
                self._store.put(step, files)
                self._prune(step)
            except Exception as error:  # a client may raise any exception; the run must continue
                failure = Failure.of(error).reason
            else:
                size, seconds = sum(file.nbytes for file in files), time.monotonic() - begun
                self._outcome = "uploaded", {"step": step, "bytes": size, "seconds": seconds}
                break
        else:
            self._outcome = "upload_failed", {"step": step, "reason": failure}
        shutil.rmtree(links, ignore_errors=True)

    def _linked(self, step: int, links: Path) -> Path:
        """Return hard links to the checkpoint, which outlive its removal; else the checkpoint."""
        checkpoint = self._folder.checkpoints / f"step-{step}"
        if links.exists():
            return links
        try:
            links.mkdir()
            for path in checkpoint.iterdir():
                os.link(path, links / path.name)
        except OSError:
            shutil.rmtree(links, ignore_errors=True)
            return checkpoint
        return links

    def _prune(self, step: int) -> None:
        """Remove older uploads beyond ``checkpoint.upload.keep_last``."""
        keep = self._upload.keep_last
        if keep is None or self._store is None:
            return
        for old in [each for each in self._store.steps() if each <= step][:-keep]:
            if not stays(self._config, old):
                with suppress(FileNotFoundError):
                    self._store.remove(old)
