"""Pause a training process before a step, so that tests do not depend on a run's duration."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 300.0


@dataclass(frozen=True)
class Gate:
    """Gate before training step ``step`` for processes started with ``environment``.

    ``folder`` must be new: a gate serves one start.
    """

    folder: Path
    step: int

    @property
    def environment(self) -> dict[str, str]:
        """Return variables to add to the environment of the process and its children."""
        self.folder.mkdir(exist_ok=True)
        here = str(Path(__file__).parent / "gate")
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "GATE_FOLDER": str(self.folder), "GATE_STEP": str(self.step)}

    def wait(self, process: subprocess.Popen[str], ranks: int = 1) -> None:
        """Wait until ``ranks`` processes are at the gate; fail with the output
        if ``process`` ends."""
        until = time.monotonic() + LIMIT_S
        while len(list(self.folder.iterdir())) < ranks:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, f"step {self.step} did not come in {LIMIT_S:.0f} s"
            time.sleep(0.02)

    def open(self) -> None:
        """Let the waiting processes continue."""
        (self.folder / "open").touch()
