"""The GPU benchmark: results stored between calls, and its comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allometry.configs.loader import load

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"device": "a GPU", "commit": "1"}


@pytest.fixture
def throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    import throughput

    module: ModuleType = throughput
    return module


def measured(throughput: ModuleType, tokens_per_s: float, peak_bytes: int) -> dict[str, Any]:
    shape = throughput.SHAPES["1b"]
    seconds = [60.0] * throughput.WARMUP_STEPS + [shape.tokens / tokens_per_s] * 3
    result: dict[str, Any] = throughput.measured(shape, 8, seconds, None)
    return {**result, "mfu": 0.6, "peak_bytes": peak_bytes}


def test_warm_up_steps_do_not_count(throughput: ModuleType) -> None:
    result = measured(throughput, 70_000.0, 1)
    assert result["tokens_per_s"] == pytest.approx(70_000.0)
    assert result["first_step_s"] == 60.0


def test_a_run_cut_off_in_its_warm_up_has_no_rate(throughput: ModuleType) -> None:
    result = throughput.measured(throughput.SHAPES["1b"], 8, [60.0, 2.0], "the time was over")
    assert result["tokens_per_s"] is None


def test_a_second_call_keeps_what_the_first_measured_but_takes_no_ratio_across(
    throughput: ModuleType, tmp_path: Path
) -> None:
    path, ratio = tmp_path / "out.json", throughput.Ratio("1b", "1b, HF loop", 1.15)
    first = throughput.Results(path, FACTS)
    first.add("1b", measured(throughput, 80_000.0, 50))
    second = throughput.Results(path, FACTS)
    assert "1b" in second
    assert "1b, HF loop" not in second
    second.add("1b, HF loop", measured(throughput, 40_000.0, 100))
    assert "not yet measured in one call" in throughput.line_of(ratio, second)
    second.add("1b", measured(throughput, 80_000.0, 50))
    row = throughput.line_of(ratio, second)
    assert "| 2.000 | >= 1.15: met | 0.50: met |" in row
    assert "not yet measured" in throughput.table(second)


def test_results_of_another_commit_are_not_mixed_in(throughput: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    throughput.Results(path, FACTS).add("1b", measured(throughput, 1.0, 1))
    with pytest.raises(SystemExit, match="another commit"):
        throughput.Results(path, FACTS | {"commit": "2"})


def test_a_failed_part_is_tried_again_and_says_why(throughput: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    failed = throughput.measured(throughput.SHAPES["1b"], 8, [], "no such kernel")
    throughput.Results(path, FACTS).add("1b", failed)
    again = throughput.Results(path, FACTS)
    assert "1b" not in again
    assert "no such kernel" in throughput.table(again)


@pytest.mark.parametrize("rehearsed", [False, True])
def test_every_part_is_a_configuration_that_loads(
    throughput: ModuleType, tmp_path: Path, rehearsed: bool
) -> None:
    shapes = throughput.REHEARSED if rehearsed else throughput.SHAPES
    for part in throughput.PARTS:
        shape = shapes[part.shape]
        if part.contender != "allometry":
            model = throughput.dense_model(shape)
            assert throughput.model_flops_per_token(shape) > 6 * model.width**2
            continue
        bench = throughput.Bench(shapes, "cpu", tmp_path, math.inf)
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(bench.config(part, shape, shape.micro_batches[0], tmp_path)))
        config = load(path)
        assert config.batch.sequences * config.data.sequence_length == shape.tokens
        for key, value in part.overrides.get("training", {}).items():
            assert getattr(config.training, key) == value


def test_ratios_are_of_parts_with_the_same_model(throughput: ModuleType) -> None:
    parts = {part.name: part for part in throughput.PARTS}
    for ratio in throughput.RATIOS:
        assert parts[ratio.part].shape == parts[ratio.over].shape


@pytest.mark.parametrize("rehearsed", [False, True])
def test_every_place_of_states_is_a_configuration_that_loads(
    throughput: ModuleType, tmp_path: Path, rehearsed: bool
) -> None:
    import offload  # type: ignore[import-not-found]  # beside throughput.py

    shapes = throughput.REHEARSED if rehearsed else throughput.SHAPES
    bench = throughput.Bench(shapes, "cpu", tmp_path, math.inf)
    path = tmp_path / "config.yaml"
    for part in offload.PARTS:
        shape = shapes[part.shape]
        path.write_text(json.dumps(bench.config(part, shape, shape.micro_batches[0], tmp_path)))
        assert load(path).parallel.zero.stage == 3
    test_ratios_are_of_parts_with_the_same_model(offload)
