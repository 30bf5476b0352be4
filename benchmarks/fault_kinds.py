"""The faults that ``faults.py`` knows: how each strikes, and how it shows that it did."""

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
LAST_FULL = 36  # the last step after which a disk is filled: saves come after it
NOBODY = "nobody: the run had ended"
DISK_BYTES = 24 << 20  # of a disk that is filled
FULL_S = 20.0  # for which it stays full at most
SLOW_MS = 20  # of each write to a disk that is slow


# A fault strikes once its moment has come, and returns whom.


def signalled(
    signal_: signal.Signals,
) -> Callable[[Launch, random.Random, int], str]:
    """Send a signal to one rank."""

    def strike(launch: Launch, draw: random.Random, ranks: int) -> str:
        wanted = draw.randrange(ranks)
        launch.wait(lambda: wanted in launch.ranks())
        victim = launch.ranks().get(wanted)
        if victim is None:
            return NOBODY
        victim.send_signal(signal_)
        return f"rank {wanted}"

    return strike


kill = signalled(signal.SIGKILL)  # the launcher starts all again
stop = signalled(signal.SIGSTOP)  # the watchdogs of the others end the launch, and so on


def launcher(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to the launcher: its ranks end with it."""
    launch.ranks()
    launch.process.kill()
    return "the launcher"


def everything(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to the launcher and all ranks, as a node that goes down."""
    there = launch.ranks()
    launch.process.kill()
    for process in there.values():
        process.kill()
    return "the launcher and all ranks"


def nothing(launch: Launch, draw: random.Random, ranks: int) -> str:
    """What a rank does to itself (fault_hook): nothing from outside."""
    return "a rank, by itself"


def fill(launch: Launch, draw: random.Random, ranks: int) -> str:
    """Fill the disk until a save has failed, then make room again: the run goes on."""
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
    """Failures to save that the main rank has printed; the record waits for room."""
    log = folder.with_suffix(".log").read_text(errors="replace").splitlines()
    return [line for line in log if "CHECKPOINT FAILED" in line]


def kill_in_save(launch: Launch, draw: random.Random, ranks: int) -> str:
    """SIGKILL to one rank while a checkpoint is being written."""
    partial = launch.folder / "checkpoints"
    launch.wait(lambda: any(partial.glob(".step-*.partial")))
    time.sleep(draw.uniform(0.0, 1.0))
    return f"{kill(launch, draw, ranks)} in a save"


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    ``inside``: what fault_hook does; ``again``: the command is given again; ``restarts``: the
    launcher starts the ranks again; ``files``: what files.c does, by its variable. ``full``: the
    run lies on a small disk. ``disturbed`` and ``straight``: what the descriptions of the run and
    of the one without a fault have besides, at the step of the strike. ``but``: columns in which
    the two may differ. ``last``: the last step after which it strikes.
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
        """Whether it may strike while ranks start; others need a step or a save."""
        return not self.inside and not self.files and not self.full

    def lacking(self) -> str | None:
        """What this machine lacks for it; None: nothing."""
        if self.files and shutil.which("cc") is None:
            return "a C compiler (cc)"
        if self.full and (os.geteuid() != 0 or shutil.which("mount") is None):
            return "the right to mount a tmpfs (root)"
        return None

    def overrides(self, step: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of the disturbed run, and of the other."""
        said = (self.disturbed, self.straight)
        disturbed, straight = (() if one is None else (one.format(step=step),) for one in said)
        return disturbed, straight

    def environment(self, case: Case, draw: random.Random, step: int, work: Path) -> dict[str, str]:
        """Variables of the launch that is disturbed; ``NAME.struck`` is made when it strikes."""
        struck = str(work / "runs" / f"{case.name}.struck")
        if self.inside is not None:
            path = os.pathsep.join([str(HERE / "fault_hook"), *_own_path()])
            told = json.dumps([self.inside, draw.randrange(case.ranks), step, struck])
            return {"PYTHONPATH": path, "FAULT": told}
        if self.files is None:
            return {}
        told = f"{SLOW_MS}"
        if self.files == "FAULT_READS":  # one read, or all from there on
            first, once = draw.randint(1, 4), draw.random() < 0.5
            told = f"{draw.randrange(case.ranks)} {first} {first if once else 1 << 30} {struck}"
        return {"LD_PRELOAD": str(shim(work)), self.files: told}

    def felt(self, folder: Path) -> int:
        """How often it showed in what the run left, where that is not a restart."""
        said = folder.with_suffix(".log").read_text(errors="replace")
        if self.files == "FAULT_READS":
            struck = folder.with_suffix(".struck")
            return len(struck.read_text().splitlines()) if struck.exists() else 0
        if self.full:
            return sum(event["event"] == "checkpoint_failed" for event in events(folder))
        if self.inside == "nan":
            return sum(event["event"] == "bad_step" for event in events(folder))
        if self.inside == "slow":  # counted where each is the rank that was slowed
            named = {e["rank"] for e in events(folder) if e["event"] == "straggler"}
            return int(named == {json.loads(folder.with_suffix(".struck").read_text())})
        return said.count("restart")


def _own_path() -> list[str]:
    """PYTHONPATH of this process, for those that it starts."""
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
        but=("flops",),  # a step that is rejected was computed, one that is skipped was not
    ),
    "slow-rank": Fault(nothing, inside="slow", restarts=False, last=4),  # it takes a while to see
    "corrupt-read": Fault(kill, files="FAULT_READS"),
}


def mounted(folder: Path) -> None:
    """Make ``folder`` a small disk of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(words, check=True)


def unmounted(folder: Path) -> None:
    """Remove such a disk with what is on it, if it is there."""
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)
