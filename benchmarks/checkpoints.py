"""Measure seconds, CPU seconds and bytes read of saving and of resuming from a checkpoint.

    python benchmarks/checkpoints.py [--gigabytes 1.5] [--ranks 1 2] [--rounds 5] [--folder DIR]
                                     [--json FILE]

Each rank saves an equal share of fp32 tensors. In each round all variants run in turn on the same
folder; before each resume the files are dropped from the page cache (posix_fadvise), so that reads
come from the disk. ``read back`` and ``main rank`` are the methods of earlier versions: shards were
read again after writing, and the main rank read the entire checkpoint while the other ranks waited.
``load alone`` verifies checksums while it reads; torch's reader does not. For example,
``--gigabytes 1 --ranks 2`` saves 0.5 GB per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from contenders.machine import facts
from contenders.race import free_port
from torch import multiprocessing
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from allometry.configs.execution import ParallelConfig
from allometry.parallel.agree import from_main_rank
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.trainer.state import checkpoint
from allometry.trainer.state.folder import RunFolder, write_atomically
from allometry.trainer.state.integrity import ShardWriter, damage, damage_of_contents, seal

TENSOR = 4 << 20  # elements
UNVERIFIED = "load alone by torch's reader"


def save(mesh: Mesh, path: Path, state: dict[str, torch.Tensor], kind: str) -> None:
    """Write the shards of ``state``, with or without checksums."""
    writer = ShardWriter(path) if kind == "while writing" else FileSystemWriter(path)
    dcp.save(state, storage_writer=writer, process_group=mesh.checkpoint_group)
    if kind == "read back":
        for file in path.glob(f"__{mesh.rank}_*.distcp"):
            whole_file(file)
    files = mesh.gather_objects(writer.files if isinstance(writer, ShardWriter) else {})
    if mesh.is_main and kind == "while writing":
        seal(path, 1, {name: entry for mine in files for name, entry in mine.items()}, {"step": 1})


def whole_file(file: Path) -> int:
    """Return the CRC-32 of a file, read in pieces of 4 MiB."""
    crc = 0
    with open(file, "rb") as opened:
        while data := opened.read(4 << 20):
            crc = zlib.crc32(data, crc)
    return crc


def resume(mesh: Mesh, folder: RunFolder, state: dict[str, torch.Tensor], kind: str) -> None:
    """Select, verify and load a checkpoint like a launch, or let the main rank verify it."""

    def choose() -> Path:
        path = checkpoint.choose(folder, "auto")
        assert path is not None
        if kind == "main rank":
            assert damage(path, contents=True) is None
        return path

    path = from_main_rank(mesh, choose, "choosing")
    if kind == UNVERIFIED:
        reader = FileSystemReader(path)
        dcp.load(state, storage_reader=reader, process_group=mesh.checkpoint_group)
        return
    if kind == "all ranks":
        assert damage_of_contents(path, mesh) is None
    checkpoint.load(path, state, mesh)


def forget(path: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_read() -> int:
    """Return the bytes that this process has read so far, from disk or from the page cache."""
    first = Path("/proc/self/io").read_text(encoding="utf-8").split("\n")[0]
    return int(first.removeprefix("rchar: "))


def timed(mesh: Mesh, work: Callable[[], None]) -> dict[str, float]:
    """Run ``work``; return seconds of the slowest rank, and the largest CPU seconds and GB read."""
    mesh.barrier("timing")
    begun, cpu, read = time.perf_counter(), time.process_time(), bytes_read()
    work()
    mine = time.process_time() - cpu, (bytes_read() - read) / 1e9
    ranks = mesh.gather_objects(mine)
    return {
        "s": time.perf_counter() - begun,
        "cpu_s": max(cpu for cpu, _ in ranks),
        "read_GB": max(read for _, read in ranks),
    }


SAVES = ("while writing", "read back", "no checksums")
RESUMES = ("all ranks", "main rank", "load alone", UNVERIFIED)


def measure(rank: int, ranks: int, port: int, given: argparse.Namespace, out: str) -> None:
    """Run all rounds on one rank; the main rank writes the measurements to ``out``."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    measured: dict[str, list[float]] = {}

    def note(name: str, values: dict[str, float]) -> None:
        for unit, value in values.items():
            measured.setdefault(f"{name}, {unit}", []).append(value)

    with open_mesh(ParallelConfig(), torch.device("cpu")) as mesh:
        folder = RunFolder(given.folder)
        path = folder.checkpoints / "step-1"
        count = round(given.gigabytes * 1e9 / 4 / TENSOR / ranks)
        state = {f"rank{rank}.{n}": torch.rand(TENSOR) for n in range(count)}
        for round_ in range(given.rounds):
            for kind in (*SAVES[1:], SAVES[0]):  # the resumes read the last save
                if mesh.is_main:
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir(parents=True)
                    write_atomically(folder.latest, path.name)
                mesh.barrier("saving")
                taken = timed(mesh, lambda kind=kind: save(mesh, path, state, kind))
                note(f"save, {kind}", taken)
            first = round_ % len(RESUMES)
            for kind in RESUMES[first:] + RESUMES[:first]:
                if mesh.is_main:
                    forget(path)
                taken = timed(mesh, lambda kind=kind: resume(mesh, folder, state, kind))
                note(f"resume, {kind}", taken)
        if mesh.is_main:
            for name, forgotten in (("read and CRC-32, disk", True), ("the same, memory", False)):
                if forgotten:
                    forget(path)
                begun, cpu = time.perf_counter(), time.process_time()
                read = sum(file.stat().st_size for file in path.iterdir() if whole_file(file) + 1)
                cpu = time.process_time() - cpu
                note(name, {"GB/s": read / 1e9 / (time.perf_counter() - begun)})
                note(name, {"GB per s of processor": read / 1e9 / cpu})
            data, cpu = os.urandom(4 << 20), time.process_time()
            for _ in range(200):
                zlib.crc32(data)
            cpu = time.process_time() - cpu
            note("CRC-32 alone", {"GB per s of processor": 200 * len(data) / 1e9 / cpu})
            Path(out).write_text(json.dumps(measured), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--json")
    given = parser.parse_args()
    result: dict[str, Any] = {
        **facts(),
        "load": os.getloadavg(),
        "gigabytes": given.gigabytes,
        "rounds": given.rounds,
    }
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        given.folder = f"{scratch}/run"
        for ranks in given.ranks:
            out = f"{scratch}/{ranks}.json"
            arguments = (ranks, free_port(), given, out)
            multiprocessing.spawn(measure, arguments, nprocs=ranks)
            measured = json.loads(Path(out).read_text(encoding="utf-8"))
            medians = {name: statistics.median(each) for name, each in measured.items()}
            result[f"{ranks} rank(s)"] = {"measured": measured, "medians": medians}
            for name, median in medians.items():
                print(f"{ranks} rank(s)  {name:46} {median:7.2f}", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
