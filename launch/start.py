"""What must be settled before a process imports torch: the memory allocators.

On a CPU, glibc gives the large buffers of every training step back to the kernel and faults them
in again; a caching allocator, or glibc told to keep them, is worth tens of per cent
(``benchmarks/throughput.py`` measures it). An allocator is chosen by the dynamic linker, so the
process replaces itself once with the environment set.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from allometry.configs.errors import UserError

CHOICES = ("auto", "jemalloc", "tcmalloc", "glibc-tuned", "system")
_MARK = "ALLOMETRY_ALLOCATOR"  # set in the replaced process: what was chosen

# Keep what was freed: never trim the heap, serve everything from it, grow it in large steps, and
# ask for huge pages so that growing faults once for 2 MiB.
_GLIBC_TUNED = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 62),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
_LIBRARIES = {
    "jemalloc": ("jemalloc", "libjemalloc.so.2"),
    "tcmalloc": ("tcmalloc_minimal", "libtcmalloc_minimal.so.4"),
}
# By default jemalloc hands freed pages back after ten seconds, a few training steps: then it is no
# faster than glibc as it comes (measured 0.9 of tuned glibc; 1.03 when it keeps them). Kept pages
# must then serve any request: by default an extent over 64 times the request is left alone, and
# where the number of tokens differs from step to step, as on ranks that share documents, a process
# grew by a megabyte a step (measured: 0.38 to 0.60 GiB in 180 steps; 0.42 without the limit).
_PRELOADED = {
    "jemalloc": {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:20"}
}
_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


@dataclass(frozen=True)
class Allocator:
    """An allocator and the environment that selects it."""

    name: str
    environment: dict[str, str]


def find_library(kind: str) -> str | None:
    """The path of jemalloc's or tcmalloc's shared library on this machine, or None."""
    name, file = _LIBRARIES[kind]
    paths = (str(Path(folder) / file) for folder in _FOLDERS if (Path(folder) / file).exists())
    return next(paths, None) or ctypes.util.find_library(name)


def has_gpu() -> bool:
    """Whether an NVIDIA device is there, without importing torch."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


def choose(wanted: str, environment: Mapping[str, str]) -> Allocator:
    """The allocator for ``wanted``, one of CHOICES.

    ``auto``: what the user preloads already; the system's on a GPU machine, where host memory is
    not the bottleneck; else jemalloc or tcmalloc if installed, else tuned glibc. Raises UserError
    if a named one is not installed.
    """
    if wanted not in CHOICES:
        raise UserError(f"--allocator={wanted} is not known; use one of {', '.join(CHOICES)}")
    if wanted == "auto":
        if environment.get("LD_PRELOAD"):
            return Allocator(f"preloaded {environment['LD_PRELOAD']}", {})
        if has_gpu():
            return Allocator("system", {})
        for kind in _LIBRARIES:
            if path := find_library(kind):
                return _preloaded(kind, path)
        return Allocator("glibc-tuned", dict(_GLIBC_TUNED))
    if wanted in _LIBRARIES:
        path = find_library(wanted)
        if path is None:
            raise UserError(
                f"--allocator={wanted}: its library is not installed; install Debian's "
                f"lib{_LIBRARIES[wanted][0].replace('_', '-')} or use --allocator=auto"
            )
        return _preloaded(wanted, path)
    return Allocator(wanted, dict(_GLIBC_TUNED) if wanted == "glibc-tuned" else {})


def _preloaded(kind: str, path: str) -> Allocator:
    return Allocator(f"{kind} ({path})", {"LD_PRELOAD": path, **_PRELOADED.get(kind, {})})


def settle_cuda_allocator(gpu: bool | None = None) -> str | None:
    """Let torch's allocator of GPU memory grow segments instead of adding ever more; what it is.

    Sizes that differ from step to step, as of documents and experts, otherwise leave gaps that no
    tensor fits in. What the user has set stays. None: there is no GPU (``gpu``: None to look). Call
    it before torch is imported.
    """
    if not (has_gpu() if gpu is None else gpu):
        return None
    for name in _CUDA_SETTINGS:
        if name in os.environ:
            return os.environ[name]
    # torch reads the older name too, but newer versions warn of it.
    os.environ[_CUDA_SETTINGS[0]] = EXPANDABLE
    return EXPANDABLE


_CUDA_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def settle_allocator(wanted: str) -> str:
    """Make sure this process runs with the allocator; its name.

    Replaces the process (same pid, same arguments) if the environment must change, in which case
    it does not return. Call it before torch is imported.
    """
    chosen = os.environ.get(_MARK)
    if chosen is not None:
        return chosen
    allocator = choose(wanted, os.environ)
    if not allocator.environment:
        return allocator.name
    environment = os.environ | allocator.environment | {_MARK: allocator.name}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
