"""Measurement of each rank's device, memory and disk, without other ranks."""

from __future__ import annotations

import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from allometry.configs.errors import UserError
from allometry.parallel.mesh import Mesh
from allometry.trainer.record.writer import versions

REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """Machine of a rank: host, device, and the versions that must be equal on all ranks."""

    rank: int
    host: str
    device: str
    versions: dict[str, str]

    @classmethod
    def of(cls, mesh: Mesh) -> Machine:
        """Return the machine of this rank."""
        found = {name: str(version) for name, version in versions().items()}
        name = platform.processor() or platform.machine()
        if mesh.device.type == "cuda":
            name = torch.cuda.get_device_name(mesh.device)
            found["cuda"] = str(torch.version.cuda)
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return cls(mesh.rank, socket.gethostname(), name, found)


@dataclass(frozen=True)
class Rates:
    """Rates of a rank's device, with all ranks measuring at the same time; None without a GPU.

    ``flops_per_s`` of a square product in the run's type, ``copy_bytes_per_s`` of a copy in the
    device's memory (bytes read and written), ``to_device_...`` and ``to_host_...`` of pinned
    copies.
    """

    flops_per_s: float
    copy_bytes_per_s: float
    to_device_bytes_per_s: float | None
    to_host_bytes_per_s: float | None

    def describe(self) -> dict[str, Any]:
        """Return JSON."""
        return asdict(self)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure this rank's device."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    product = _median_seconds(lambda: torch.mm(a, b), device)
    buffer = torch.ones(2**28 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    other = torch.empty_like(buffer)
    copied = _median_seconds(lambda: other.copy_(buffer), device)
    to_device = to_host = None
    if on_gpu:
        pinned = torch.empty(buffer.shape, dtype=torch.uint8, pin_memory=True)
        to_device = buffer.nbytes / _median_seconds(lambda: buffer.copy_(pinned), device)
        to_host = buffer.nbytes / _median_seconds(lambda: pinned.copy_(buffer), device)
    return Rates(2 * size**3 / product, 2 * buffer.nbytes / copied, to_device, to_host)


@dataclass(frozen=True)
class DiskRates:
    """Bytes per second of all ranks together, until the slowest rank ends."""

    folder: str
    bytes_per_rank: int
    write_bytes_per_s: float
    read_bytes_per_s: float

    def describe(self) -> dict[str, Any]:
        """Return JSON."""
        return asdict(self)


def measure_disk(mesh: Mesh, folder: Path, size: int) -> DiskRates:
    """Write ``size`` bytes per rank to the disk of the checkpoints, and read them.

    Files are removed again. Written data is dropped from this machine's page cache before it is
    read; a file server may still have it in its cache. Raises UserError, on all ranks: the folder
    cannot be written.
    """
    place = _existing(folder)
    problem, wrote, read = None, 0.0, 0.0
    mesh.barrier("writing to the disk")
    try:
        with tempfile.TemporaryDirectory(prefix=f".selftest-{mesh.rank}-", dir=place) as scratch:
            path = Path(scratch) / "data"
            content = os.urandom(2**20)
            begun = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(size // len(content)):
                    file.write(content)
                os.fsync(file.fileno())
                wrote = time.perf_counter() - begun
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            mesh.barrier("reading from the disk")
            begun = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                while file.read(2**20):
                    pass
            read = time.perf_counter() - begun
    except OSError as error:
        problem = f"{place} cannot be written: {error.strerror}; set run.folder"
    told = mesh.gather_objects((problem, wrote, read))
    for rank, (said, _, _) in enumerate(told):
        if said is not None:
            raise UserError(f"rank {rank}: {said}")
    total = mesh.world_size * (size // 2**20) * 2**20
    slowest_write, slowest_read = (max(one[i] for one in told) for i in (1, 2))
    return DiskRates(str(place), size, total / slowest_write, total / slowest_read)


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return median seconds of some calls, after two untimed calls."""

    def timed() -> float:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    for _ in range(2):
        timed()
    return statistics.median(timed() for _ in range(REPEATS))
