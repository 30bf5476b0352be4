"""Every kind of layout on two gloo ranks that share one GPU, against one rank.

NCCL accepts only one rank per GPU. If gloo cannot send from GPU memory, the test is skipped with
gloo's reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from allometry.configs.loader import load
from allometry.parallel.mesh import open_mesh
from allometry.studies.certificate.small import shrunk
from allometry.studies.selftest.selftest import GradientCheck, check_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RunRanks = Callable[..., list[Any]]


def check(preset: str, overrides: list[str]) -> GradientCheck | str:
    """(On each rank) gradient check of a small model, or gloo's error."""
    small = shrunk(load(f"preset:{preset}", overrides), 2)
    with open_mesh(small.parallel, torch.device("cuda", 0)) as mesh:
        try:
            return check_gradients(small, mesh)
        except RuntimeError as error:
            if "support" not in str(error).lower():
                raise
            return str(error)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("demo", []),
        *(("demo", [f"parallel.zero.stage={stage}"]) for stage in (1, 2, 3)),
        ("demo", ["parallel.tp=2"]),
        ("demo", ["parallel.pp=2"]),
        ("demo", ["parallel.pp=2", "parallel.pipeline.schedule=zbv_zero_bubble"]),
        ("moe_demo", []),
        ("moe_demo", ["parallel.ep=2"]),
        ("moe_demo", ["parallel.tp=2"]),
        ("documents_demo", []),
    ],
)
def test_gradients_on_one_gpu(run_ranks: RunRanks, preset: str, overrides: list[str]) -> None:
    results = run_ranks(check, 2, preset, overrides)
    for result in results:
        if isinstance(result, str):
            pytest.skip(f"gloo cannot do this on a GPU: {result}")
        assert result.passed, result
