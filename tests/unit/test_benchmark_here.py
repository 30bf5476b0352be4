"""Benchmarks of this machine: scaled seconds, and decisions at a limit, by hand."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module(request.param)
    sys.modules.pop(request.param, None)


@pytest.mark.parametrize("benchmark", ["planner_here"], indirect=True)
def test_seconds_are_scaled_by_the_same_work_and_of_the_slower_rank(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    def rounds(wall: float, busy: float) -> list[dict[str, float]]:
        return [{"wall": wall, "cpu": 0.5, "reference": 0.02 * busy, "quiet": 0.02}]

    work = tmp_path / "work.jsonl"
    lines = [
        {"name": "alone", "ranks": 1, "rounds": [rounds(3.0, 3.0)]},
        {"name": "two", "ranks": 2, "rounds": [rounds(2.0, 2.0), rounds(2.0, 1.0)]},
    ]
    work.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = benchmark.read(work)
    assert found["alone"] == pytest.approx({"wall": 3.0, "scaled": 1.0, "cpu": 0.5, "busy": 3.0})
    assert found["two"]["scaled"] == pytest.approx(2.0)
    errors = benchmark.errors(np.array([1.0, 1.0]), np.array([1.0, 2.0]), np.array([2.0, 2.0]))
    assert (errors["median"], errors["worst"]) == (0.25, 0.5)


@pytest.mark.parametrize("benchmark", ["planner_here"], indirect=True)
def test_every_run_of_the_benchmark_can_be_and_is_planned(benchmark: ModuleType) -> None:
    hardware = benchmark.load_hardware("h100")
    found = {
        t.name: dict.fromkeys(("wall", "scaled", "cpu", "busy"), 0.1) for t in benchmark.TRIALS
    }
    assert len(found) == len(benchmark.TRIALS) >= 12
    assert {t.ranks for t in benchmark.TRIALS} == {1, 2}
    rows = benchmark.compare(dict(list(found.items())[:2]), hardware)["trials"]
    assert [row["name"] for row in rows] == list(found)[:2]
    for trial in benchmark.TRIALS:
        case = benchmark.Case.of(trial.config(), hardware, world_size=trial.ranks, device="cpu")
        assert not case.left_out, trial.name


@pytest.mark.parametrize("benchmark", ["memory"], indirect=True)
def test_a_wrong_decision_counts_on_its_side(benchmark: ModuleType) -> None:
    def result(predicted: int) -> object:
        same = {"predicted_kinds": {}, "measured_kinds": {}, "allocated": None}
        at = {"predicted_at": "head", "measured_at": "head"}
        return benchmark.Result("a", 1, predicted, 100, **same, **at)  # type: ignore[arg-type]

    right = benchmark.Decisions.of([result(100)], 0.0)
    assert (right.decisions, right.right) == (6, 1.0)
    over, under = (benchmark.Decisions.of([result(p)], 0.0) for p in (107, 92))
    assert (over.refused_what_fits, over.let_in_what_does_not) == (1, 0)
    assert (under.refused_what_fits, under.let_in_what_does_not) == (0, 1)
    assert benchmark.Decisions.of([result(92)], 0.05).right == 1.0


@pytest.mark.parametrize("benchmark", ["fault_settings"], indirect=True)
def test_settings_of_the_fault_campaign_are_valid_runs(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    for name in benchmark.SETTINGS:
        config = benchmark.described(name, tmp_path / "run", tmp_path / "data")
        assert (config.model.kind == "moe") == (name in benchmark.MIXTURES)
