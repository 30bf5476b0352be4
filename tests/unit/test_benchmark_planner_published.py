"""The planner's benchmark on published large runs: FLOPs, and predictions
without the run itself."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks/planner_published.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planner_published", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_flops_are_those_of_the_models_as_published(benchmark: ModuleType) -> None:
    short = {"sequence": 0}
    # Parameters without the embedding, which is a look-up: 8.03 - 0.53, 405.9 - 2.1 billion.
    assert benchmark.flops_of(benchmark.B8 | short) / 6e9 == pytest.approx(7.50, abs=0.01)
    assert benchmark.flops_of(benchmark.B405 | short) / 6e9 == pytest.approx(403.8, abs=0.2)
    # 37 billion of DeepSeek-V3's parameters are active per token, 0.9 of them the embedding.
    assert benchmark.flops_of(benchmark.DEEPSEEK | short) / 6e9 == pytest.approx(36.5, abs=1)
    row = benchmark.runs()[0].row
    assert benchmark.of_flops(benchmark.flops_of(row), row) == 1.0


def test_a_run_does_not_judge_itself(benchmark: ModuleType) -> None:
    found = benchmark.runs()
    before = benchmark.judged(found)
    found[3] = replace(found[3], tokens_per_second=3 * found[3].tokens_per_second)
    after = benchmark.judged(found)
    same = after == before
    assert same[1::2].all()  # its own half, without which it is predicted
    assert not same[::2].any()
    assert np.isfinite(before).all()
