"""Progress of a long preparation: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import sys
import time
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY_S = 10.0


class ProgressReport:
    """Prints progress to ``stream`` (default: standard error), or no output if ``quiet``.

    For example: ``report.begin("encoding web", total_bytes)``, then ``report.advance(n)`` for each
    n bytes.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        console = Console(file=stream or sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            text = TextColumn("{task.description}")
            speed = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(text, BarColumn(), *speed, console=console, transient=True)
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._spoke = "", 0, 0, 0.0

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def begin(self, label: str, total_bytes: int) -> None:
        """Start a phase of ``total_bytes``, which ends the previous phase."""
        self._label, self._total, self._done = label, total_bytes, 0
        self._spoke = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Add ``num_bytes`` to the finished work; in a log file, print a line every 10 s."""
        self._done += num_bytes
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, num_bytes)
        elif time.monotonic() - self._spoke >= _LINE_EVERY_S:
            self._spoke = time.monotonic()
            share = 100 * self._done / max(1, self._total)
            self.say(
                f"{self._label}: {self._done / 1e6:.1f} of {self._total / 1e6:.1f} MB "
                f"({share:.0f} %)"
            )
