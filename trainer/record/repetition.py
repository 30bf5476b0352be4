"""Detect overfitting on a repeated source: training loss falls while held-out loss rises."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from typing_extensions import override

from allometry.trainer.record.callbacks import Callback, Reporter
from allometry.trainer.record.columns import FinishedStep
from allometry.trainer.record.writer import Row
from allometry.trainer.state.checkpoint import saved, step_of
from allometry.trainer.state.folder import RunFolder

EVALUATIONS = 3
"""Number of consecutive evaluations, each compared with the one before."""


@dataclass
class _Source:
    """A source since its last evaluation, and its trend in the last evaluations."""

    losses: list[float] = field(default_factory=list)
    training: float = math.nan
    held_out: float = math.nan
    step: int = 0
    streak: int = 0
    before: tuple[int, float] = (0, math.nan)  # step and held-out loss before the streak


class RepetitionWatch(Callback):
    """Reports ``overfits`` after a source's first epoch; runs on the main rank.

    The training loss of an evaluation is the mean of ``loss/SOURCE`` over the steps since the
    previous evaluation. A launch begins without earlier evaluations.
    """

    def __init__(self, folder: RunFolder, report: Reporter) -> None:
        self._folder, self._report = folder, report
        self._sources: dict[str, _Source] = {}

    @override
    def additions(self, finished: FinishedStep) -> Row:
        for name, loss in finished.losses.items():
            self._sources.setdefault(name, _Source()).losses.append(loss)
        return {}

    @override
    def on_row(self, row: Row) -> None:
        for name, source in self._sources.items():
            held_out = row.get(f"validation/{name}")
            if held_out is not None and source.losses:
                self._look(name, source, float(held_out), row)

    def _look(self, name: str, source: _Source, held_out: float, row: Row) -> None:
        training = sum(source.losses) / len(source.losses)
        worse = training < source.training and held_out > source.held_out
        if worse and float(row[f"epochs/{name}"]) > 1.0:
            if not source.streak:
                source.before = source.step, source.held_out
            source.streak += 1
        else:
            source.streak = 0
        source.losses, source.training, source.held_out = [], training, held_out
        source.step = int(row["step"])
        if source.streak == EVALUATIONS:
            best, before = source.before
            kept = [step_of(path) for path in saved(self._folder) if step_of(path) <= best]
            self._report(
                "overfits",
                step=source.step,
                source=name,
                epochs=float(row[f"epochs/{name}"]),
                best_step=best,
                held_out_before=before,
                held_out=held_out,
                training=training,
                checkpoint=f"step-{kept[-1]}" if kept else None,
            )
