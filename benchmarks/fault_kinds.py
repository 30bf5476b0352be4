"""Faults of ``faults.py``: how each is injected, and how the run folder shows its effect."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_compare import events
from fault_launch import Case, Launch, shim
from fault_settings import STEPS

HERE = Path(__file__).parent
LAST_FULL = 36  # last step after which the disk is filled: saves must follow
NOBODY = "nobody: the run had ended"
DISK_BYTES = 24 << 20  # size of the disk that is filled
FULL_S = 20.0  # longest time for which the disk stays full
SLOW_MS = 20  # delay of each write to a slow disk


# Each function injects a fault at once and returns the name of the affected processes.


def signalled(
    signal_: signal.Signals,
) -> Callable[[Launch, random.Random, int], str]:
    """Return a function that sends a signal to one random rank."""

    def strike(launch: Launch, draw: random.Random, ranks: int) -> str:
        wanted = draw.randrange(ranks)
        launch.wait(lambda: wanted in launch.ranks())
        victim = launch.ranks().get(wanted)
        if victim is None:
            return NOBODY
        victim.send_signal(signal_)
        return f"rank {wanted}"

    return strike


kill = signalled(signal.SIGKILL)  # the launcher restarts all ranks
stop = signalled(signal.SIGSTOP)  # the other ranks' watchdogs end the launch; then as kill


def launcher(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Send SIGKILL to the launcher; its ranks must end as well."""
    launch.ranks()
    launch.process.kill()
    return "the launcher"


def everything(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Send SIGKILL to the launcher and to all ranks, like a failing node."""
    there = launch.ranks()
    launch.process.kill()
    for process in there.values():
        process.kill()
    return "the launcher and all ranks"


def nothing(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Do nothing from outside: the rank injects the fault itself (fault_hook)."""
    return "a rank, by itself"


def fill(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Fill the disk until a save has failed, then free the space; the run must continue."""
    filler, until = launch.folder / "filler", time.time() + FULL_S
    failed = len(_failed(launch.folder))
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    launch.wait(lambda: len(_failed(launch.folder)) > failed or time.time() > until)
    time.sleep(draw.uniform(0.0, 0.5))
    filler.unlink()
    return "the disk"


def _failed(folder: Path) -> list[str]:
    """Return the failed saves printed by the main rank; events.jsonl cannot grow on a full disk."""
    log = folder.with_suffix(".log").read_text(errors="replace").splitlines()
    return [line for line in log if "CHECKPOINT FAILED" in line]


def kill_in_save(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Send SIGKILL to one rank while a checkpoint is being written."""
    partial = launch.folder / "checkpoints"
    launch.wait(lambda: any(partial.glob(".step-*.partial")))
    time.sleep(draw.uniform(0.0, 1.0))
    return f"{kill(launch, draw, ranks)} in a save"


@dataclass(frozen=True)
class Fault:
    """Kind of fault and its expected effects.

    ``inside``: action of fault_hook. ``again``: the command is started again. ``restarts``: the
    launcher restarts the ranks. ``files``: variable that selects the action of files.c. ``full``:
    the run folder is on a small disk. ``disturbed`` and ``straight``: config overrides of the
    disturbed run and of its reference, formatted with the step of the fault. ``but``: prefixes of
    columns that may differ between them. ``last``: last step after which the fault is injected.
    """

    strike: Callable[[Launch, random.Random, int], str]
    inside: str | None = None
    again: bool = False
    restarts: bool = True
    files: str | None = None
    full: bool = False
    disturbed: str | None = None
    straight: str | None = None
    but: tuple[str, ...] = ()
    last: int = STEPS - 1

    @property
    def anywhere(self) -> bool:
        """True if the fault can occur during startup; other faults need a step or a save."""
        return not self.inside and not self.files and not self.full

    def lacking(self) -> str | None:
        """Return the requirement that this machine lacks for the fault, or None."""
        if self.files and shutil.which("cc") is None:
            return "a C compiler (cc)"
        if self.full and (os.geteuid() != 0 or shutil.which("mount") is None):
            return "the right to mount a tmpfs (root)"
        return None

    def overrides(self, step: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the config overrides of the disturbed run and of the reference run."""
        said = (self.disturbed, self.straight)
        disturbed, straight = (() if one is None else (one.format(step=step),) for one in said)
        return disturbed, straight

    def environment(self, case: Case, draw: random.Random, step: int, work: Path) -> dict[str, str]:
        """Return environment variables of the disturbed launch; the fault makes ``NAME.struck``."""
        struck = str(work / "runs" / f"{case.name}.struck")
        if self.inside is not None:
            path = os.pathsep.join([str(HERE / "fault_hook"), *_own_path()])
            told = json.dumps([self.inside, draw.randrange(case.ranks), step, struck])
            return {"PYTHONPATH": path, "FAULT": told}
        if self.files is None:
            return {}
        told = f"{SLOW_MS}"
        if self.files == "FAULT_READS":  # a single read, or all reads from it on
            first, once = draw.randint(1, 4), draw.random() < 0.5
            told = f"{draw.randrange(case.ranks)} {first} {first if once else 1 << 30} {struck}"
        return {"LD_PRELOAD": str(shim(work)), self.files: told}

    def felt(self, folder: Path) -> int:
        """Count the effects of the fault in the run folder and log, if it causes no restart."""
        said = folder.with_suffix(".log").read_text(errors="replace")
        if self.files == "FAULT_READS":
            struck = folder.with_suffix(".struck")
            return len(struck.read_text().splitlines()) if struck.exists() else 0
        if self.full:
            return sum(event["event"] == "checkpoint_failed" for event in events(folder))
        if self.inside == "nan":
            return sum(event["event"] == "bad_step" for event in events(folder))
        if self.inside == "slow":  # 1 if all straggler events name the slowed rank
            named = {e["rank"] for e in events(folder) if e["event"] == "straggler"}
            return int(named == {json.loads(folder.with_suffix(".struck").read_text())})
        return said.count("restart")


def _own_path() -> list[str]:
    """Return this process's PYTHONPATH for its child processes."""
    own = os.environ.get("PYTHONPATH")
    return [own] if own else []


FAULTS = {
    "kill": Fault(kill),
    "memory": Fault(nothing, inside="exit137"),
    "hang": Fault(nothing, inside="hang"),
    "launcher": Fault(launcher, again=True),
    "everything": Fault(everything, again=True),
    "stop": Fault(stop),
    "disk-full": Fault(fill, full=True, restarts=False, last=LAST_FULL),
    "slow-disk": Fault(kill_in_save, files="FAULT_WRITES"),
    "nan": Fault(
        nothing,
        inside="nan",
        restarts=False,
        disturbed="training.bad_steps={{}}",
        straight="training.skip_steps=[{step}]",
        but=("flops",),  # a rejected step was computed, a skipped step was not
    ),
    "slow-rank": Fault(nothing, inside="slow", restarts=False, last=4),  # takes time to detect
    "corrupt-read": Fault(kill, files="FAULT_READS"),
}


def mounted(folder: Path) -> None:
    """Mount a small tmpfs on ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(words, check=True)


def unmounted(folder: Path) -> None:
    """Unmount the tmpfs on ``folder`` if there is one; its contents are lost."""
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
