"""Facts about the machine and the code of a measurement, stored with its result."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allometry.launch.start import choose
from allometry.trainer.record.hardware import describe
from allometry.trainer.record.writer import commit
from contenders.shape import Shape


def surroundings(
    shape: Shape, given: argparse.Namespace, allocators: Sequence[str]
) -> dict[str, Any]:
    """Return JSON values; ``given`` has the options ``threads``, ``rounds``,
    ``warmup``, ``steps``."""
    import torch

    names = ("torch", "transformers", "accelerate", "numpy")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "commit": commit(),
        "hardware": {
            **describe(torch.device("cpu")),
            "cores": os.cpu_count(),
            "threads": given.threads,
            "memory_bytes": memory,
            "flags": _matrix_flags(),
        },
        "versions": {name: importlib.metadata.version(name) for name in names},
        "shape": asdict(shape),
        "rounds": given.rounds,
        "warmup_steps": given.warmup,
        "timed_steps": given.steps,
        "allocators": {name: choose(name, {}).environment for name in allocators},
    }


def _matrix_flags() -> list[str]:
    """Return the processor's flags for bf16 products."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
