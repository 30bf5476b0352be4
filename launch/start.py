"""Memory allocators, which are chosen before a process imports torch.

On a CPU, glibc returns the large buffers of every training step to the kernel and faults them in
again; a caching allocator, or glibc configured to keep its buffers, is faster by tens of percent
(``benchmarks/throughput.py`` measures the difference). The dynamic linker chooses the allocator, so
the process replaces itself once with the environment set.
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
_MARK = "ALLOMETRY_ALLOCATOR"  # set in the replaced process: name of the allocator

# Keep freed memory: never trim the heap, serve every request from the heap, grow it in large steps,
# and use huge pages, so that growth faults once per 2 MiB.
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
# By default jemalloc returns freed pages after ten seconds, a few training steps, and is then no
# faster than untuned glibc (measured 0.9 of tuned glibc; 1.03 if the pages are kept). Kept pages
# must then serve any request: by default jemalloc does not reuse an extent over 64 times the
# request, and if the number of tokens differs between steps, as on ranks that share documents, a
# process grew by a megabyte per step (measured: 0.38 to 0.60 GiB in 180 steps; 0.42 without the
# limit).
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
    """Allocator and the environment variables that select it."""

    name: str
    environment: dict[str, str]


def find_library(kind: str) -> str | None:
    """Return the path of the shared library of jemalloc or tcmalloc on this machine, or None."""
    name, file = _LIBRARIES[kind]
    paths = (str(Path(folder) / file) for folder in _FOLDERS if (Path(folder) / file).exists())
    return next(paths, None) or ctypes.util.find_library(name)


def has_gpu() -> bool:
    """Return True if the machine has an NVIDIA device, without importing torch."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


def choose(wanted: str, environment: Mapping[str, str]) -> Allocator:
    """Return the allocator for ``wanted``, one of CHOICES.

    ``auto``: the library in LD_PRELOAD if the user has set it; the system's allocator on a GPU
    machine, where host memory is not the bottleneck; otherwise jemalloc or tcmalloc if installed,
    or tuned glibc. Raises UserError if a requested library is not installed. For example,
    ``choose("auto", os.environ).name``.
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
    """Enable expandable segments of torch's CUDA allocator; return the setting, None without a GPU.

    Sizes that differ between steps, such as of documents and experts, otherwise fragment the
    memory. A setting of the user is kept. ``gpu``: None to detect a GPU. Call this function before
    torch is imported.
    """
    if not (has_gpu() if gpu is None else gpu):
        return None
    for name in _CUDA_SETTINGS:
        if name in os.environ:
            return os.environ[name]
    # torch also reads the older name, but newer versions print a warning for it.
    os.environ[_CUDA_SETTINGS[0]] = EXPANDABLE
    return EXPANDABLE


_CUDA_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"


def settle_allocator(wanted: str) -> str:
    """Run this process with the allocator ``wanted`` and return the allocator's name.

    Replaces the process (same pid, same arguments) if the environment must change, and does not
    return in this case. Call this function before torch is imported. For example,
    ``settle_allocator("jemalloc")``.
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
