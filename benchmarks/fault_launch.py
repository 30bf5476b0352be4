"""Launch of a run disturbed by ``faults.py``, observed from outside its processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
from fault_settings import described

from allometry.configs.loader import dump

LIMIT_S = 120.0  # for a start and the steps after it; a longer launch hangs
ORPHANS_S = 5.0  # after which ranks without a launcher must have ended
SHIM = Path(__file__).parent / "fault_hook" / "files.c"


@dataclass(frozen=True)
class Case:
    """Launch to disturb: fault, setting, number of ranks and random seed."""

    fault: str
    setting: str
    ranks: int
    number: int
    plain: bool = False
    times: int = 1

    @property
    def name(self) -> str:
        """Return the key of the case, which is also its folder's name."""
        more = "-plain" * self.plain + f"-x{self.times}" * (self.times > 1)
        return f"{self.fault}-{self.setting}-{self.ranks}{more}-{self.number}"


def rank_of(process: psutil.Process) -> int | None:
    """Return the rank of a process, from its name or, during startup, from its environment."""
    named = process.name().split(" ")
    number = named[1] if named[0] == "rank" else process.environ().get("RANK")
    return None if number is None else int(number)


class Launch:
    """Running launch and the processes observed so far."""

    def __init__(
        self,
        case: Case,
        folder: Path,
        data: Path,
        fault: dict[str, str],
        overrides: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.begun = folder, time.time()
        self._limit_s = LIMIT_S * (1 + case.times)
        config = folder.with_suffix(".yaml")
        config.write_text(dump(described(case.setting, folder, data, overrides)))
        module = "torch.distributed.run" if case.plain else "allometry.launch.torchrun"
        words = [sys.executable, "-m", module, "--nproc-per-node", str(case.ranks)]
        words += [
            "--max-restarts",
            str(2 * case.times + 1),
            "-m",
            "allometry.launch.train",
            str(config),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | fault
        with open(folder.with_suffix(".log"), "ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        self.seen: dict[int, psutil.Process] = {}

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the ranks that are alive, by rank number."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.seen[child.pid] = child
                rank = rank_of(child)
                if rank is not None and child.parent() == psutil.Process(self.process.pid):
                    found[rank] = child
        except psutil.Error:  # the process has ended
            pass
        return found

    def wait(self, until: Callable[[], bool] = lambda: False) -> None:
        """Return once ``until`` is true or the launcher has ended; kill it after LIMIT_S."""
        looked = 0.0
        while self.process.poll() is None and not until():
            if time.time() - looked > 0.3:
                self.ranks()
                looked = time.time()
            if time.time() - self.begun > self._limit_s:
                self.process.kill()
            time.sleep(0.01)

    def alive(self) -> int:
        """Return the number of observed processes that are still running."""

        def lives(process: psutil.Process) -> bool:
            try:
                return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False

        return sum(map(lives, self.seen.values()))

    @cached_property
    def orphans(self) -> int:
        """Wait for the launcher's end; count the processes still running ORPHANS_S later."""
        self.process.wait()
        until = time.time() + ORPHANS_S
        while self.alive() and time.time() < until:
            time.sleep(0.05)
        left = self.alive()
        for process in self.seen.values():
            if left and process.is_running():
                process.kill()
        return left


def shim(work: Path) -> Path | None:
    """Return the compiled ``files.c`` to preload into ranks, or None without a C compiler."""
    compiler, library = shutil.which("cc"), work / "files.so"
    if compiler is None:
        return None
    if not library.exists():
        words = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"]
        subprocess.run(words, check=True)
    return library
