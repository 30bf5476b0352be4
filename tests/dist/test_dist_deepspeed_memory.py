"""The memory of two deepspeed steps, counted tensor by tensor, equals the estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from allometry.configs.run import RunConfig
from allometry.studies.memory.probe import Measured, predicted
from deepspeed_cases import needs_deepspeed
from test_dist_memory_probe import CASES, measured
from thinned import thinned

RunRanks = Callable[..., list[Any]]
BY_NAME = {case.name: case for case in CASES}


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "case", "bucket_mib"),
    thinned(
        {(3, "dense, few tokens", 1)},
        [1, 2, 3],
        ["dense, few tokens", "dense, bf16", "moe, bf16", "dense, saved FP8"],
        [1, 64],
    ),
)
def test_predicted_within_a_tenth_of_measured(
    run_ranks: RunRanks, stage: int, case: str, bucket_mib: int
) -> None:
    tree = BY_NAME[case].config().model_dump(mode="json")
    tree["parallel"]["zero"] = {"engine": "deepspeed", "stage": stage, "bucket_mib": bucket_mib}
    config = RunConfig.model_validate(tree)
    found: list[Measured] = run_ranks(measured, 2, config)
    fullest = max(found, key=lambda one: one.bytes)
    estimate = predicted(config, 2, "cpu", fullest.rank)
    assert estimate.total == pytest.approx(fullest.bytes, rel=0.1)
