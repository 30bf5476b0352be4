"""Shared parts of the tests of the deepspeed engine: requirements, and comparison of runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from allometry.configs.run import RunConfig
from allometry.parallel.deepspeed import ops
from run_folders import rows

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install deepspeed==0.19.8",
)
needs_nvme = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or not ops.is_built(),
    reason="DeepSpeed's async_io is not built: allometry doctor --build",
)
STEADY = ("optimizer.eps=1e-4", "optimizer.lr=3e-3")
"""With AdamW's usual epsilon, gradients near zero turn the last bit of a sum into a full step."""


def losses(config: RunConfig) -> list[float]:
    """Return the losses of a run, by step."""
    return [row["loss"] for row in rows(Path(config.run.folder))]


def assert_close(one: RunConfig, other: RunConfig, steps: int = 20) -> None:
    """Assert that all losses of two runs agree within 1e-6."""
    assert losses(one) == pytest.approx(losses(other), rel=0, abs=1e-6)
    assert len(losses(one)) == steps
