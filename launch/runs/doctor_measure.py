"""Measurement of this machine as hardware for the planner: ``allometry doctor --measure``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import torch
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from allometry.configs.errors import UserError
from allometry.configs.machine import HardwareConfig, measured_file
from allometry.launch.start import choose
from allometry.optim.offload.rates import DiskRates, disk_rates
from allometry.studies.machine.describe import ASSUMED_POWER_W, describe
from allometry.studies.machine.pieces import measured_at
from allometry.studies.machine.ranks import measure_alone, measure_ranks
from allometry.trainer.record import hardware as device_facts
from allometry.trainer.state.folder import write_atomically

MOST_RANKS = 32
MESSAGES_S = 12.0


@dataclass(frozen=True)
class MeasuredMachine:
    """Description of the machine, its files, and rates of the disk and of one process's AdamW."""

    hardware: HardwareConfig
    disk: DiskRates
    adam_rate: float
    files: tuple[Path, ...]


def measure(disk: Path, out: Path | None) -> MeasuredMachine:
    """Measure this machine and write its description.

    Takes about a minute on an idle machine. Raises UserError: a file cannot be written. For
    example, ``measure(Path.cwd(), Path("machine.yaml"))``.
    """
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out={out} is to be a YAML file; name it {out}.yaml")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: the folder {out.parent} is not there; make it first")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    allocator = choose("auto", os.environ).environment  # as runs use
    found = measure_alone(allocator, ("bf16", "fp32"))
    cores = psutil.cpu_count(logical=False) or 1
    ranks = torch.cuda.device_count() if on_gpu else min(cores, MOST_RANKS)
    if ranks > 1:
        threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
        alone = torch.get_num_threads()
        found["together"] = measure_ranks(ranks, threads, alone, MESSAGES_S, allocator)
    rates = disk_rates(disk)
    found["disk"], found["at"]["disk"] = rates.write, measured_at()
    hardware = describe(found, _machine(device, ranks, found))
    text = as_yaml(hardware, found, disk)
    written = []
    for file in filter(None, (measured_file(), out)):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
            written.append(file)
        except (OSError, RuntimeError) as error:
            if file is out:
                raise UserError(f"--out={out} cannot be written: {error}") from None
    return MeasuredMachine(hardware, rates, found["adam_rate"], tuple(written))


def _machine(device: torch.device, ranks: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of this machine that are read, not measured."""
    total = psutil.virtual_memory().total
    facts: dict[str, Any] = {
        "name": str(device_facts.describe(device)["device"]),
        "memory_bytes": total,
        "host_memory_bytes": total,
        "ranks": ranks,
        "disk_bandwidth": found["disk"],
        "adam_rate": found["adam_rate"] * (1 if device.type == "cuda" else ranks),
        "asynchronous": device.type == "cuda",
    }
    if device.type == "cuda":
        facts["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        sheet = device_facts.peak(device, torch.bfloat16)
        facts["peak_flops"] = {"bf16": sheet.flops_per_s}
        facts["power_w"] = _power()
    return facts


def _power() -> float | None:
    """Return the power limit of the first GPU in watts, or None."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return float(pynvml.nvmlDeviceGetPowerManagementLimit(handle)) / 1000
    except pynvml.NVMLError:
        return None


def as_yaml(hardware: HardwareConfig, found: Mapping[str, Any], disk: Path) -> str:
    """Return the description as YAML, with the time and method of each number as comments."""
    at, threads = found["at"], found["threads"]
    together = found.get("together")
    layers = f"{at['heads']}: least squares on layers and heads of ours, not compiled"
    ranks = "assumed: there are no other ranks here"
    crowd = ranks
    if together is not None:
        ranks = f"{together['at']['messages']}: messages among {together['ranks']} ranks, the best"
        if "crowd" in together:
            crowd = f"{together['at']['crowd']}: medians, one rank alone and all in turn"
    assumed = f"assumed, not measured: {ASSUMED_POWER_W:.0f} W unless the driver tells"
    why = {
        "peak_flops": f"{at['products']}: the fastest product; threads of a rank: {threads}",
        "attainable": f"{at['products']}: least squares on products of {len(found['products'])}"
        " sizes",
        "attention": f"{at['attention']}: forward and backward, least squares over lengths",
        "memory_bytes": "read from the system",
        "memory_bandwidth": f"{at['copy_bytes_per_s']}: a copy, bytes read and written",
        "power_w": assumed,
        "asynchronous": "a CPU computes and launches in turn",
        "gpus_per_node": "cores or GPUs of this machine",
        "inside": ranks,
        "across": "assumed: as inside; this machine is alone",
        "disk_bandwidth": f"{at['disk']}: written to {disk.resolve()}, median, past the page cache",
        "adam_rate": f"{at['adam_rate']}: torch's fused AdamW in one rank, for all",
        "crowds": crowd,
        "constants": f"{layers}; those of messages: {ranks}",
    }
    yaml = YAML()
    yaml.width = 100
    text = StringIO()
    yaml.dump(_commented(hardware.model_dump(mode="json"), why, 0), text)
    return text.getvalue()


def _commented(tree: Mapping[str, Any], why: Mapping[str, str], depth: int) -> CommentedMap:
    """Return the tree for YAML, with numbers of four digits and a comment above keys of ``why``."""
    made = CommentedMap()
    for key, value in tree.items():
        if isinstance(value, float):
            made[key] = float(f"{value:.4g}")
        elif isinstance(value, dict):
            inside = {} if key == "constants" else why  # whose keys are not names of fields
            made[key] = _commented(value, inside, depth + 1)
            numbers = all(isinstance(one, float) for one in value.values())
            if value and numbers and not set(value) & set(inside):
                made[key].fa.set_flow_style()
        elif isinstance(value, list):
            made[key] = [_commented(one, why, depth + 1) for one in value]
        else:
            made[key] = value
        if key in why:
            made.yaml_set_comment_before_after_key(key, before=why[key], indent=2 * depth)
    return made
