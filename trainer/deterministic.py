"""``training.deterministic``: repeat a step bit for bit, also on CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from allometry.configs.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")
"""Workspaces of fixed size, with which cuBLAS is deterministic (cuBLAS manual, section 2.1.4)."""


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Use deterministic torch kernels inside the context; operators without one raise an error.

    Enter the context before CUDA is initialized, because cuBLAS then reads its workspace from the
    environment. Compiled code is not autotuned, because timings would choose the order of a sum
    anew in each process.

    Raises:
        UserError: the environment sets a workspace with which cuBLAS is not deterministic.
    """
    if not deterministic:
        yield
        return
    given = os.environ.setdefault(WORKSPACE, REPEATABLE[0])
    if given not in REPEATABLE:
        raise UserError(
            f"training.deterministic=true cannot hold with {WORKSPACE}={given} in the environment; "
            f"unset it or use {REPEATABLE[0]}"
        )
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # a module that has a property
    filled = memory.fill_uninitialized_memory
    tuned = _tuned_by_the_clock(False)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # would write every new tensor once more
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
        _tuned_by_the_clock(tuned)


def _tuned_by_the_clock(wanted: bool) -> bool:
    """Allow or forbid torch's compiler to choose kernels by time; return the old setting."""
    from torch._inductor import config  # the import takes a second

    was = not getattr(config, "deterministic", False)
    if hasattr(config, "deterministic"):  # missing in some versions of torch
        config.deterministic = not wanted
    return was
