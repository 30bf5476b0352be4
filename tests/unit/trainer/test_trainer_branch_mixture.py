"""Branches with other data than their trunk: each source continues at its next sample."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import events, rows
from shell import Shell

CPU = torch.device("cpu")


def test_a_decay_on_other_data(
    tiny: Callable[..., RunConfig],
    tiny_store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other weights and a new source, from the branch on; the trunk is unchanged."""
    stable = "schedule={kind: constant, warmup_steps: 3}"
    config = tiny(stable, "checkpoint.keep_steps=[8]", folder=tmp_path / "trunk")
    train(config, device=CPU, callbacks=[], stop_at_step=10)
    before = (tmp_path / "trunk" / "metrics.jsonl").read_bytes()
    sources = [one.model_dump() | {"weight": 1.0} for one in config.data.sources]
    new = {"name": "new", "train": str(tiny_store / "down.validation"), "weight": 2.0}
    (tmp_path / "decay.yaml").write_text(
        json.dumps(
            {
                "data": {"sources": [*sources, new]},
                "schedule": {"kind": "wsd", "warmup_steps": 3, "decay_fraction": 0.3},
            }
        )
    )
    words = ("branch", tmp_path / "trunk", "--at", 8, "--config", tmp_path / "decay.yaml")
    said = Shell(capsys).json(*words)
    train(load(said["config"]), device=CPU, callbacks=[])
    branch, trunk = rows(Path(said["run"])), rows(tmp_path / "trunk")
    assert [row["loss"] for row in branch[:8]] == [row["loss"] for row in trunk[:8]]
    assert "tokens/new" not in branch[7]
    names = ("up", "down", "new")
    read = [branch[-1][f"tokens/{n}"] - branch[7].get(f"tokens/{n}", 0) for n in names]
    assert sum(read) == 12 * 256
    assert read == pytest.approx([768, 768, 1536], abs=64)
    said_of = events(Path(said["run"]))
    kinds = [event["event"] for event in said_of if event["event"] != "repetition"]
    assert kinds[:2] == ["branched", "mixture_changed"]
    assert (tmp_path / "trunk" / "metrics.jsonl").read_bytes() == before
