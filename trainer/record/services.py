"""Send rows to TensorBoard, Weights & Biases and the display, in addition to metrics.jsonl."""

from __future__ import annotations

import importlib
import io
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typing_extensions import override

from allometry.configs.errors import UserError
from allometry.configs.execution import RecordConfig, WandB
from allometry.laws.runs import read_lines
from allometry.trainer.record.appending import Appender
from allometry.trainer.record.callbacks import Callback, Display
from allometry.trainer.record.writer import Row
from allometry.trainer.state.folder import RunFolder, write_atomically

_log = logging.getLogger(__name__)
_VERSION = "brain.Event:2"  # of the format of event files


def _events() -> Any:
    """Return the module of TensorBoard's events, whose classes are created on import."""
    return importlib.import_module("tensorboard.compat.proto.event_pb2")


class TensorBoard(Callback):
    """Writes scalars for TensorBoard: rows of every ``every_steps``, validation and forecasts.

    A run without event files, such as a branch, first writes the rows in its folder. Events are
    written here instead of by torch's SummaryWriter, whose thread ends on a full disk and loses its
    queue; here they are kept until there is space, like rows of metrics.jsonl.
    """

    def __init__(self, folder: RunFolder, every_steps: int) -> None:
        self._folder, self._every = folder, every_steps
        self._file: Appender | None = None
        self._failing = False

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        """Begin a file that hides steps which will be computed again."""
        proto = _events()
        place = self._folder.tensorboard
        new = not any(place.glob("events.*"))
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._warn(f"{error.strerror}: this launch leaves it out")
            return
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{first_step:010d}"
        self._file = Appender(place / f"events.out.tfevents.{name}", "entries")
        self._add(proto.Event(file_version=_VERSION))
        if first_step > 1:
            self._add(proto.Event(step=first_step, session_log={"status": proto.SessionLog.START}))
        for row in _history(self._folder, first_step) if new else ():
            self.on_row(row)

    @override
    def on_row(self, row: Row) -> None:
        step = int(row["step"])
        rare = any(key.startswith(("validation/", "forecast/")) for key in row)
        if self._file is None or (step % self._every and not rare):
            return
        values = [
            {"tag": key if "/" in key else f"train/{key}", "simple_value": float(value)}
            for key, value in row.items()
            if key != "step"
        ]
        self._add(_events().Event(step=step, summary={"value": values}))

    @override
    def on_end(self) -> None:
        if self._file is not None and (lost := self._file.close()) is not None:
            _log.warning("%s; metrics.jsonl has all", lost)
        self._file = None

    def _add(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self._file is not None
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        reason = self._file.append(record.getvalue())
        if reason is not None and not self._failing:
            self._warn(f"{reason}: it is tried again with each row")
        self._failing = reason is not None

    def _warn(self, text: str) -> None:
        _log.warning("%s cannot be written (%s)", self._folder.tensorboard, text)


class WeightsAndBiases(Callback):
    """Sends rows to Weights & Biases at their steps; a continued run continues its page.

    Steps repeated after a crash have the same numbers as on the page. A rewound run begins a new
    page, because W&B accepts no step twice, and so does a branch, with the rows in its folder.
    """

    def __init__(self, config: WandB, folder: RunFolder) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "record.wandb is set but the package wandb is not installed; "
                "pip install 'allometry[wandb]' or set record.wandb: null"
            ) from None
        self._wandb, self._config, self._folder = wandb, config, folder
        self._run: Any = None
        self._identity = folder.path / "wandb_id"

    @override
    def on_event(self, kind: str, details: dict[str, Any]) -> None:
        if kind == "abandoned_checkpoint":  # called before ``on_start``
            self._identity.unlink(missing_ok=True)

    @override
    def on_start(self, facts: dict[str, Any], first_step: int) -> None:
        new = not self._identity.exists()
        try:
            if new:
                write_atomically(self._identity, uuid.uuid4().hex[:12])
            self._run = self._wandb.init(
                **self._config.model_dump(),
                id=self._identity.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(self._folder.path),
                name=self._folder.path.name,
                config=facts,
            )
        except (OSError, self._wandb.Error) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"record.wandb: Weights & Biases cannot be used ({reason}); log in with "
                "wandb login, set record.wandb.mode=offline, or record.wandb: null"
            ) from None
        for row in _history(self._folder, first_step) if new else ():
            self.on_row(row)

    @override
    def on_row(self, row: Row) -> None:
        if self._run is not None:
            with self._unless_failing():
                self._run.log(dict(row), step=int(row["step"]))

    @override
    def on_end(self) -> None:
        if self._run is not None:
            with self._unless_failing():
                self._run.finish()

    @contextmanager
    def _unless_failing(self) -> Iterator[None]:
        """Stop logging to W&B after an error; training continues and metrics.jsonl is complete."""
        try:
            yield
        except (OSError, self._wandb.Error) as error:
            self._run = None
            _log.warning(
                "Weights & Biases takes no more (%s): this launch leaves it out from here on, and "
                "metrics.jsonl has all",
                " ".join(str(error).split()),
            )


def standard_callbacks(record: RecordConfig, folder: RunFolder) -> list[Callback]:
    """Return the callbacks requested by the ``record`` section."""
    chosen: list[Callback] = [Display(record.display_every_steps)]
    if record.tensorboard:
        chosen.append(TensorBoard(folder, record.display_every_steps))
    if record.wandb is not None:
        chosen.append(WeightsAndBiases(record.wandb, folder))
    return chosen


def _history(folder: RunFolder, first_step: int) -> list[Row]:
    """Return the rows before this launch, including those of its trunk, for a new page."""
    return [row for row in read_lines(folder.metrics) if row["step"] < first_step]
