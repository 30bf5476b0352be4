"""Merging a run on two ranks gives the weights of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.studies.merge import merge_run
from test_dist_runs import launch
from thinned import thinned

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
LAYOUTS = {
    "tp2": ("parallel.tp=2",),
    "pp2-tied": ("parallel.pp=2", "model.tied_embeddings=true"),
    "hdp2-zero3": ("parallel.zero.stage=3",),
}
SETTINGS = (
    *("training.total_steps=6", "training.compute_dtype=fp64"),
    *("checkpoint={every_steps: 2, keep_last: 3}", "schedule={kind: constant, warmup_steps: 1}"),
)


@pytest.mark.parametrize("layout", thinned({"tp2"}, tuple(LAYOUTS)))
def test_the_layout_of_the_run_does_not_matter(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, layout: str
) -> None:
    more = LAYOUTS[layout]
    model = [setting for setting in more if setting.startswith("model")]
    run_ranks(launch, 1, tiny(*SETTINGS, *model, folder=tmp_path / "one"))
    run_ranks(launch, 2, tiny(*SETTINGS, *more, folder=tmp_path / "two"))
    for name in ("one", "two"):
        merge_run(tmp_path / name, tmp_path / f"merged-{name}", 3, "sqrt")
    one, two = (
        CheckpointWeights(tmp_path / f"merged-{name}" / "checkpoints" / "step-0")
        for name in ("one", "two")
    )
    last = CheckpointWeights(tmp_path / "two" / "checkpoints" / "step-6")
    assert one.shapes == two.shapes
    moved = 0.0
    for name in one.shapes:
        assert one.types()[name] == last.types()[name]
        tolerance = 1e-12 if one.types()[name] == torch.float64 else 1e-6
        torch.testing.assert_close(two.read(name), one.read(name), rtol=0, atol=tolerance)
        moved = max(moved, float((two.read(name) - last.read(name)).abs().max()))
    assert moved > 1e-3, "a merge is another point than the last checkpoint"
