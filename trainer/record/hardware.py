"""Properties of a rank's device: peak matrix rate, memory."""

from __future__ import annotations

import json
import math
import platform
import re
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from allometry.configs import json_file
from allometry.trainer.state.folder import write_atomically

KEPT = Path("~/.cache/allometry/peaks.json")
LEAST_PRODUCTS, MEASURED_S = 5, 1.0

# Dense bf16 TFLOP/s from the manufacturers' data sheets, by a part of the device's name.
_DATASHEET_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "GH200": 989.4,
    "H800": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}


@dataclass(frozen=True)
class Peak:
    """Matrix rate relative to which MFU is computed, in FLOP/s, and its source."""

    flops_per_s: float
    source: str


def peak(device: torch.device, dtype: torch.dtype, kept: Path = KEPT) -> Peak:
    """Return the data sheet's dense bf16 rate of a known GPU, else the rate of a measured product.

    For a GPU the bf16 rate is also used in fp32 and fp64 runs, so that MFU is comparable. For a CPU
    a matrix product in ``dtype`` is timed on one thread, and the rate multiplied by the number of
    threads. Measured rates are stored in the file ``kept``, by machine, device and torch version,
    so that all launches on a machine use the same number; delete the file to measure again. If the
    file cannot be written, each launch measures for itself.
    """
    threads = 1
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s\-_/]+", name))
        for part, tflops in _DATASHEET_TFLOPS.items():
            if set(part.split()) <= words:
                return Peak(tflops * 1e12, f"data sheet, dense bf16, {name}")
        dtype = torch.bfloat16
    else:
        name, threads = _cpu_name(), torch.get_num_threads()
    size = 8192 if device.type == "cuda" else 1024
    kind = f"{str(dtype).removeprefix('torch.')} product of {size}x{size}"
    key = f"{platform.node()}, {name}, torch {torch.__version__}, {kind}"
    rates = _read_rates(kept)
    if key not in rates:
        rates[key] = _measure(device, dtype, size)
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home directory
            place = kept.expanduser()
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(rates, indent=1) + "\n")
    said = f", {threads} x one thread" if device.type == "cpu" else ""
    return Peak(threads * rates[key], f"measured, {kind}{said}")


def _read_rates(kept: Path) -> dict[str, float]:
    """Return measured FLOP/s by key; empty if the file is missing or damaged."""
    with suppress(OSError, RuntimeError, ValueError):
        found = json_file.read(kept.expanduser())
        if isinstance(found, dict) and all(
            isinstance(rate, float) and math.isfinite(rate) and rate > 0.0
            for rate in found.values()
        ):
            return found
    return {}


def _measure(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return FLOP/s of the fastest of the products run in one second, at least five.

    On a CPU the thread's CPU time is used, because wall time on a busy machine includes waiting:
    with 28 processes on 2 cores CPU time gave 100 to 109 GFLOP/s, wall time 15 to 41.
    """
    own = torch.Generator(device)  # the run's generators are not used
    left, right = (
        torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2)
    )
    clock, threads = time.thread_time, torch.get_num_threads()
    if device.type == "cuda":
        clock = time.perf_counter
    best, number, begun = float("inf"), 0, time.perf_counter()
    torch.set_num_threads(1)
    try:
        while number < LEAST_PRODUCTS or time.perf_counter() - begun < MEASURED_S:
            start = clock()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best, number = min(best, clock() - start), number + 1
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / best


def peak_bytes(device: torch.device) -> int:
    """Return peak memory so far in bytes: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_bytes(device: torch.device) -> None:
    """Reset the peak memory before training; not possible for a CPU's process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def describe(device: torch.device) -> dict[str, str | int]:
    """Return the device's name, for run.json."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
