"""``training.deterministic``: the same step gives the same bits, on CUDA too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from allometry.configs.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")
"""Workspaces of fixed size, with which cuBLAS repeats its sums (cuBLAS manual, section 2.1.4)."""


@contextmanager
def algorithms(*, deterministic: bool) -> Iterator[None]:
    """Let torch use kernels without a race meanwhile, and refuse those that have no such twin.

    Enter it before CUDA starts, as cuBLAS reads its workspace from the environment then. Compiled
    code is not tuned by the clock, which would choose the order of a sum anew in each process.

    Raises:
        UserError: the environment asks for a workspace with which cuBLAS does not repeat itself.
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
    memory: Any = torch.utils.deterministic  # a module with a property
    filled = memory.fill_uninitialized_memory
    tuned = _tuned_by_the_clock(False)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # costs a pass over every tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
        _tuned_by_the_clock(tuned)


def _tuned_by_the_clock(wanted: bool) -> bool:
    """Say whether torch's compiler may time kernels to choose among them; return what was so."""
    from torch._inductor import config  # a second to import

    was = not getattr(config, "deterministic", False)
    if hasattr(config, "deterministic"):  # not in every version of torch
        config.deterministic = not wanted
    return was
