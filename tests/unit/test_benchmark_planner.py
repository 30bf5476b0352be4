"""The planner's benchmark: its measures by hand, and its table if the data are available."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from allometry.configs.machine import load_hardware
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.cost import step_time

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data/planner/calibration.csv.gz"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = ROOT / "benchmarks/planner.py"
    spec = importlib.util.spec_from_file_location("planner_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_errors_are_of_throughput(benchmark: ModuleType) -> None:
    found = benchmark.errors(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 8.0]))
    # Throughputs 1, 1/2 and 1/4 were predicted to be 1, 1 and 1/8.
    assert (found["rows"], found["median"]) == (3, 0.5)
    assert found["p90"] == pytest.approx(0.9)
    assert found["bias"] == 0


def test_what_equal_configurations_differ_by_is_the_floor(benchmark: ModuleType) -> None:
    row = {
        **{"layers": 24, "width": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128},
        **{"ffn": 8192, "vocab": 50304, "sequence": 2048, "global_batch": 256, "hardware": "a100"},
        **{"dp": 8, "micro_batch": 1},
    }
    rows = [row, row | {"micro_batch": 2}, row, row]
    cases = Cases.of(rows, {"a100": load_hardware("a100")})
    seconds, nothing = np.array([1.0, 9.0, 1.1, 0.8]), np.zeros(4)
    measured = benchmark.Measured(cases, seconds, nothing, nothing, nothing, nothing, 0)
    found = benchmark.repeated(measured)
    assert found["rows"] == 3
    assert found["median"] == pytest.approx(0.1)
    assert benchmark.repeated(measured.take(np.array([0, 1]))) is None


def test_published_layouts_are_read_and_ordered(benchmark: ModuleType) -> None:
    if not DATA.is_file():
        pytest.skip(f"the published measurements are not on this machine ({DATA.resolve()})")
    measured = benchmark.read(DATA)
    assert (len(measured.seconds), measured.left_out) == (3419, 63)
    assert measured.low.sum() == 633
    slow = measured.slow > benchmark.SLOW
    # One source has nearly all runs that other runs of their source prove to be slow.
    assert np.unique(measured.source[slow], return_counts=True)[1].tolist() == [4, 890]
    healthy = measured.take(~slow)
    # With the constants before any calibration.
    found = benchmark.ranking(healthy, step_time(healthy.cases).seconds)
    assert found["tau"] > 0.6
    assert found["regret"] < 0.05
