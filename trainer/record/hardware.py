"""What the device under a rank can do: peak matrix rate, memory."""

from __future__ import annotations

import platform
import re
import resource
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

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


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's dense bf16 rate of a known GPU, else a measured matrix product.

    A GPU's fp32 and fp64 runs are also held against its bf16 rate, so that MFU compares across
    them. A CPU has no such number: there a product in ``dtype`` is timed on the threads in use.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s\-_/]+", name))
        for part, tflops in _DATASHEET_TFLOPS.items():
            if set(part.split()) <= words:
                return Peak(tflops * 1e12, f"data sheet, dense bf16, {name}")
        dtype = torch.bfloat16
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    kind = str(dtype).removeprefix("torch.")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Peak(2 * size**3 / best, f"measured, {kind} product of {size}x{size}{threads}")


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
