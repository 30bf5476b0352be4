"""Optimizer states off the GPU: bitwise equal, less GPU memory, pinned host memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.parallel.buffers import BLOCK, host_buffer
from allometry.trainer.train import train
from run_folders import events, rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Make = Callable[..., RunConfig]
CUDA = torch.device("cuda")
OPTIMIZERS = {
    "adamw": {"kind": "adamw", "lr": 1e-2},
    "muonh": {"kind": "muonh", "lr": 1e-2, "weight_decay": 0.0},
}


def losses(
    tiny: Make, folder: Path, optimizer: str, states: dict[str, Any] | None, *more: str
) -> list[float]:
    run = tiny(
        f"parallel.zero.optimizer_states={json.dumps(states)}",
        f"optimizer={json.dumps(OPTIMIZERS[optimizer])}",
        *("model.width=64", "model.ffn_width=160", "training.deterministic=true", *more),
        folder=folder,
    )
    for stop in (7, None):
        train(run, device=CUDA, callbacks=[], stop_at_step=stop)
    return [row["loss"] for row in rows(folder)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("place", ["cpu", "nvme", "all"])
def test_every_place_gives_the_losses_of_the_gpu(
    tiny: Make, tmp_path: Path, place: str, optimizer: str
) -> None:
    swap = {"nvme": str(tmp_path / "swap"), "bucket_mib": 0.1}
    states = {"cpu": {"bucket_mib": 0.1}, "nvme": swap, "all": swap | {"device": 0.3, "cpu": 0.4}}
    wanted = losses(tiny, tmp_path / "memory", optimizer, None)
    assert losses(tiny, tmp_path / "away", optimizer, states[place]) == wanted
    said = next(e for e in events(tmp_path / "away") if e["event"] == "optimizer_states")
    assert said["cpu_bytes"] + said["nvme_bytes"] > said["device_bytes"]


def test_host_buffers_are_locked_and_begin_at_a_block() -> None:
    buffer = host_buffer(3 * BLOCK, CUDA)
    assert buffer.is_pinned()
    assert buffer.data_ptr() % BLOCK == 0
    again = host_buffer(3 * BLOCK, CUDA)
    del buffer, again
    assert host_buffer(3 * BLOCK, CUDA).is_pinned()


SHARDED = ("parallel.zero.stage=3", "training.compute_dtype=bf16")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("place", ["cpu", "nvme", "all"])
def test_masters_and_gradients_off_the_gpu_give_its_losses(
    tiny: Make, tmp_path: Path, place: str, optimizer: str
) -> None:
    away = {"master_weights": True, "gradients": True, "bucket_mib": 0.1}
    swap = away | {"nvme": str(tmp_path / "swap")}
    states = {"cpu": away, "nvme": swap, "all": swap | {"device": 0.3, "cpu": 0.4}}
    wanted = losses(tiny, tmp_path / "memory", optimizer, None, *SHARDED)
    assert losses(tiny, tmp_path / "away", optimizer, states[place], *SHARDED) == wanted
    said = next(e for e in events(tmp_path / "away") if e["event"] == "optimizer_states")
    assert said["parameters_bytes"] > 0


def test_the_gpu_holds_copies_and_buckets_alone(tiny: Make, tmp_path: Path) -> None:
    """2 of 16 bytes per parameter, and the buckets; 16 without offload."""
    wide = ("model.width=512", "model.ffn_width=2048", "model.num_layers=6", *SHARDED)
    held = {}
    for name, states in (
        ("memory", None),
        ("away", {"master_weights": True, "gradients": True, "bucket_mib": 2}),
    ):
        run = tiny(
            f"parallel.zero.optimizer_states={json.dumps(states)}",
            *wide,
            folder=tmp_path / name,
        )
        train(run, device=CUDA, callbacks=[], stop_at_step=3)
        held[name] = rows(tmp_path / name)[-1]["peak_bytes"]
    parameters = 6 * (4 * 512 * 512 + 3 * 512 * 2048)
    assert held["memory"] - held["away"] > 8 * parameters
