"""Holding a training process at a step, so that no test depends on how long a run takes."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

LIMIT_S = 300.0


@dataclass(frozen=True)
class Gate:
    """Processes started with ``environment`` wait before training step ``step``.

    ``folder`` must be new: a gate is for one start.
    """

    folder: Path
    step: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables to be added to the process's own; its children inherit them."""
        self.folder.mkdir(exist_ok=True)
        here = str(Path(__file__).parent / "gate")
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, "GATE_FOLDER": str(self.folder), "GATE_STEP": str(self.step)}

    def wait(self, process: subprocess.Popen[str], ranks: int = 1) -> None:
        """Return when so many processes wait; fail with the output if ``process`` ends before."""
        until = time.monotonic() + LIMIT_S
        while len(list(self.folder.iterdir())) < ranks:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, f"step {self.step} did not come in {LIMIT_S:.0f} s"
            time.sleep(0.02)

    def open(self) -> None:
        """Let them go on."""
        (self.folder / "open").touch()
