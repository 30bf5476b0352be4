"""Runs with activations offloaded to the host: the same losses, and the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
LARGE = (
    *("model.num_layers=4", "model.width=128", "batch.micro_batch_sequences=4"),
    *("training.total_steps=6", "checkpoint.every_steps=3", "schedule.warmup_steps=1"),
    *("data.sequence_length=64", "data.packing=concatenated"),
    *("record.monitors={every_steps: null, singular_values_every_steps: null}",),
)
ONE_INPUT = 4 * 4 * 64 * 128
"""Bytes of a block's input, in fp32."""


def share(number: float) -> str:
    return f"training.activation_offload={number}"


def trained(config: RunConfig, stop: int | None = None) -> list[dict[str, Any]]:
    train(config, device=CPU, callbacks=[], stop_at_step=stop)
    return rows(Path(config.run.folder))


def test_losses_are_the_same_and_bytes_are_counted(tiny: Make, tmp_path: Path) -> None:
    plain = trained(tiny(*LARGE, folder=tmp_path / "plain"))
    full = "training.activation_checkpointing=full"
    away = tiny(*LARGE, full, share(1.0), folder=tmp_path / "away")
    trained(away, stop=3)
    # The placement of activations may change on resume.
    found = trained(tiny(*LARGE, share(0.5), folder=tmp_path / "away"))
    assert [row["loss"] for row in found] == [row["loss"] for row in plain]
    assert all(key not in row for row in plain for key in row if key.startswith("offload/"))
    moved = [row["offload/bytes_out"] for row in found]
    assert moved[:3] == [2 * 2 * ONE_INPUT] * 3  # of two layers in two micro-batches
    assert moved[3:] == [moved[3]] * 3
    assert moved[3] > 10 * ONE_INPUT  # all saved tensors of one layer
    assert [row["offload/bytes_in"] for row in found] == moved
    assert len({row["offload/host_bytes"] for row in found}) == 1

    record = json.loads((tmp_path / "away" / "run.json").read_text())
    assert [launch["layout"]["activation_offload"] for launch in record["launches"]] == [1.0, 0.5]
    traffic = record["plan"]["activation_offload"]
    assert traffic["layers"] == 1
    assert traffic["step_bytes"] == 2 * traffic["layer_bytes"]


def test_too_few_layers_are_refused_before_the_run(tiny: Make, tmp_path: Path) -> None:
    config = tiny(share(0.5), folder=tmp_path / "run")
    with pytest.raises(UserError, match=r"training.activation_offload=0.5 leaves two layers"):
        train(config, device=CPU, callbacks=[])
    assert not (tmp_path / "run").exists()
