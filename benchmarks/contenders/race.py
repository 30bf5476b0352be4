"""Start contenders, each run in a separate process, and read their measurements."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from allometry.launch.start import choose
from contenders import ours
from contenders.shape import SHAPES, Shape

Kind = Literal["plain", "trainer", "fsdp2", "ours"]

_MODULES = {
    "plain": "contenders.plain",
    "trainer": "contenders.hf_trainer",
    "fsdp2": "contenders.fsdp2",
}
# Variables that would favour one contender, or differ from the settings of the row.
_CLEARED = ("LD_PRELOAD", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "ALLOMETRY_ALLOCATOR")


@dataclass(frozen=True)
class Entry:
    """Contender with its settings: one row of the race.

    ``overrides`` (``section.key=value``) change Allometry's config; ``label`` then names the row.
    """

    kind: Kind
    dtype: str = "bf16"
    compile: bool = False
    allocator: str = "system"
    processes: int = 1
    stage: int = 0
    label: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        labels = {
            "plain": "plain loop, compiled" if self.compile else "plain loop, eager",
            "trainer": "Trainer, eager",
            "fsdp2": "plain FSDP2, eager",
            "ours": "Allometry" if self.processes == 1 else f"Allometry, ZeRO {self.stage}",
        }
        return f"{self.label or labels[self.kind]} [{self.dtype}, {self.allocator}]"


@dataclass(frozen=True)
class Run:
    """Run of an entry. ``others_share``: share of the cores' time used by other processes."""

    entry: Entry
    round: int
    step_seconds: list[float]
    tokens_per_s: float
    losses: list[float]
    wall_s: float
    others_share: float

    def describe(self) -> dict[str, Any]:
        return {"name": self.entry.name, **asdict(self)}


@dataclass
class Race:
    """Settings shared by all runs. ``folder`` contains the token store and the runs' files."""

    threads: int
    warmup: int
    steps: int
    folder: Path
    compile_cache: Path
    shape_name: str = "25m"
    store: Path = field(init=False)

    def __post_init__(self) -> None:
        self.store = ours.write_store(self.folder, self.shape)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    def run(self, entry: Entry, round: int) -> Run:
        """Run ``entry`` in a separate process; RuntimeError with its output if it fails."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        environment = self.environment(entry.processes)
        if entry.kind != "ours":  # Allometry sets the same allocator variables itself
            environment = with_allocator(environment, entry.allocator)
        wall, others = self.start(entry.name, self._command(entry, place), environment)
        seconds, losses = self._read(entry, place)
        shutil.rmtree(place)  # the run has written a checkpoint
        _check_losses(entry, losses, self.shape)
        timed = seconds[self.warmup :]
        assert len(timed) == self.steps, (entry.name, len(timed))
        return Run(
            entry=entry,
            round=round,
            step_seconds=seconds,
            tokens_per_s=self.shape.tokens_per_step / statistics.median(timed),
            losses=losses,
            wall_s=wall,
            others_share=others,
        )

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[float, float]:
        """Run ``command`` to its end; return its seconds and the load of other processes."""
        busy, begun = _busy_seconds(), time.perf_counter()
        finished = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        wall = time.perf_counter() - begun
        others = max(0.0, (_busy_seconds() - busy) / (wall * (os.cpu_count() or 1)))
        if finished.returncode:
            raise RuntimeError(f"{name} failed:\n{finished.stdout}\n{finished.stderr}")
        return wall, others

    def environment(self, processes: int) -> dict[str, str]:
        """Return the environment of each of ``processes``: thread counts, without an allocator."""
        clean = {
            key: value
            for key, value in os.environ.items()
            if key not in _CLEARED and not key.startswith("MALLOC_")
        }
        clean["OMP_NUM_THREADS"] = str(max(1, self.threads // processes))
        clean["TORCHINDUCTOR_CACHE_DIR"] = str(self.compile_cache)
        return clean

    def _command(self, entry: Entry, place: Path) -> list[str]:
        start = [sys.executable]
        if entry.processes > 1:
            start += ["-m", "torch.distributed.run", "--nproc-per-node", str(entry.processes)]
            start += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        if entry.kind == "ours":
            config = place / "config.yaml"
            ours.write_config(
                config,
                self.store,
                place / "run",
                dtype=entry.dtype,
                steps=self.warmup + self.steps,
                processes=entry.processes,
                stage=entry.stage,
                shape=self.shape,
            )
            return [
                *start,
                "-m",
                "allometry.launch.train",
                str(config),
                *entry.overrides,
                "--allocator",
                entry.allocator,
            ]
        command = [*start, "-m", _MODULES[entry.kind], "--dtype", entry.dtype]
        command += ["--shape", self.shape_name]
        command += ["--warmup", str(self.warmup), "--steps", str(self.steps)]
        command += ["--out", str(place / "out.json")]
        return [*command, "--compile"] if entry.compile else command

    def _read(self, entry: Entry, place: Path) -> tuple[list[float], list[float]]:
        if entry.kind == "ours":
            allocator = ours.read_allocator(place / "run")
            assert allocator.startswith(entry.allocator), (allocator, entry.allocator)
            return ours.read_rows(place / "run")
        result = json.loads((place / "out.json").read_text(encoding="utf-8"))
        return result["step_seconds"], result["losses"]


def alternate(race: Race, entries: Sequence[Entry], rounds: int) -> list[Run]:
    """Run all entries in every round, in alternating order so that drift affects all equally."""
    runs = []
    for round in range(1, rounds + 1):
        order = entries if round % 2 else entries[::-1]
        for entry in order:
            runs.append(race.run(entry, round))
            last = runs[-1]
            print(
                f"round {round}/{rounds}  {last.tokens_per_s:7.0f} tok/s  {entry.name}  "
                f"({last.wall_s:.0f} s, others {100 * last.others_share:.0f} %)",
                flush=True,
            )
    return runs


def with_allocator(environment: Mapping[str, str], allocator: str) -> dict[str, str]:
    return {**environment, **choose(allocator, environment).environment}


def _check_losses(entry: Entry, losses: list[float], shape: Shape) -> None:
    """Check that the losses of a new model on random tokens are near the log of the vocabulary."""
    expected = math.log(shape.vocab_size)
    if not losses or any(not abs(loss - expected) < 1.0 for loss in losses):
        raise RuntimeError(f"{entry.name} does not train as it should: losses {losses}")


def _busy_seconds() -> float:
    """Return the CPU seconds of this machine, without those of our finished child processes."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    spent = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent - children.ru_utime - children.ru_stime


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
