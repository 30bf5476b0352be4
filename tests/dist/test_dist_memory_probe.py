"""The memory of a step, counted tensor by tensor, equals the estimate without torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.parallel.mesh import open_mesh
from allometry.studies.memory.probe import Measured, predicted, probe

RunRanks = Callable[..., list[Any]]
QUICK = (
    *("dense, bf16", "moe, bf16", "dense, hdp2 ZeRO 3", "dense, pp2 1F1B", "moe, ep2"),
    *("dense, saved FP8, full", "moe, fp8_rowwise, saved FP8"),
    *("dense, FP8 states, MuonH, few tokens", "dense, pp2, saved FP8"),
)


def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES = benchmark().cases()


def measured(config: RunConfig) -> Measured:
    """(On each rank) memory of two steps."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        return probe(config, mesh)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow)
        for case in CASES
    ],
)
def test_predicted_within_a_tenth_of_measured(run_ranks: RunRanks, case: Any) -> None:
    config = case.config()
    found: list[Measured] = run_ranks(measured, case.ranks, config)
    fullest = max(found, key=lambda one: one.bytes)
    estimate = predicted(config, case.ranks, "cpu", fullest.rank)
    assert estimate.total == pytest.approx(fullest.bytes, rel=0.1)
    held = {"parameters": estimate.parameters, "optimizer states": estimate.optimizer_states}
    assert {kind: fullest.peak.kinds[kind] for kind in held} == pytest.approx(held, rel=0.01)


def test_quick_cases_are_cases() -> None:
    assert set(QUICK) <= {case.name for case in CASES}
