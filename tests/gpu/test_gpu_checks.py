"""Checks for silent corruption on a GPU: checksums as on a CPU, products, NVML, repeated steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.record.bits import checksum
from allometry.trainer.record.cards import NvmlCard
from allometry.trainer.record.twice import products_wrong
from allometry.trainer.train import train
from run_folders import events, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CUDA = torch.device("cuda", 0)


def test_checksums_are_those_of_a_cpu() -> None:
    for size in (1, 37, 3_000_001):
        values = torch.randn(size)
        assert int(checksum(values.to(CUDA))) == int(checksum(values))
        assert int(checksum(values.to(CUDA)[1:])) == int(checksum(values[1:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right(dtype: torch.dtype) -> None:
    assert products_wrong(CUDA, dtype) == 0


def test_nvml_speaks_of_this_card() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    reading = NvmlCard(CUDA).read()
    assert reading.temperature_c is not None
    assert 0 < reading.temperature_c < 120
    assert (reading.sm_mhz or 0) > 0


def test_a_run_repeats_its_steps(tiny: Make, tmp_path: Path) -> None:
    keys = ("training.total_steps=4", "schedule.warmup_steps=1", "training.deterministic=true")
    checked = tiny(*keys, "record.checks.twice_every_steps=1", folder=tmp_path / "checked")
    plain = tiny(*keys, folder=tmp_path / "plain")
    for config in (checked, plain):
        train(config, device=CUDA, callbacks=[])
    said = {event["event"] for event in events(tmp_path / "checked")}
    assert not said & {"computed_twice_differs", "self_test_failed"}
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("checked", "plain")]
    assert losses[0] == losses[1]
