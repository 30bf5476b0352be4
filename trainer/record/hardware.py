"""What the device under a rank can do: peak matrix rate, memory."""

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

# Dense bf16 TFLOP/s from the makers' data sheets, by a part of the device's name.
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
    """The matrix rate that MFU is measured against, in FLOP/s, and where it comes from."""

    flops_per_s: float
    source: str


def peak(device: torch.device, dtype: torch.dtype, kept: Path = KEPT) -> Peak:
    """The data sheet's dense bf16 rate of a known GPU, else a measured matrix product.

    A GPU's fp32 and fp64 runs are also held against its bf16 rate, so that MFU compares across
    them. A CPU has no such number: there a product in ``dtype`` is timed on one thread, and the
    rate multiplied by the threads in use. What was measured is kept in the file ``kept``, under
    the machine's, the device's and torch's names, so that all launches on a machine are held
    against one number; delete the file to measure again. Where it cannot be written, each launch
    measures for itself.
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
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            place = kept.expanduser()
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, json.dumps(rates, indent=1) + "\n")
    said = f", {threads} x one thread" if device.type == "cpu" else ""
    return Peak(threads * rates[key], f"measured, {kind}{said}")


def _read_rates(kept: Path) -> dict[str, float]:
    """FLOP/s by what was measured; empty where there is no such file, or it is damaged."""
    with suppress(OSError, RuntimeError, ValueError):
        found = json_file.read(kept.expanduser())
        if isinstance(found, dict) and all(
            isinstance(rate, float) and math.isfinite(rate) and rate > 0.0
            for rate in found.values()
        ):
            return found
    return {}


def _measure(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the fastest of the products that a second allows, at least five.

    On a CPU by the time that the thread ran, as on a busy machine the time on the wall says how
    often it waited: with 28 processes on 2 cores the one gave 100 to 109 GFLOP/s, the other 15 to
    41.
    """
    own = torch.Generator(device)  # whether it is measured or read leaves no trace in the run
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
    """Most memory in use so far: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_bytes(device: torch.device) -> None:
    """Forget what was in use before training; a CPU's process cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def describe(device: torch.device) -> dict[str, str | int]:
    """The device by name, for run.json."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
