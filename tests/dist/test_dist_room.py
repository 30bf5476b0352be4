"""If one rank cannot write the last checkpoint, all ranks fail alike."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer import save
from allometry.trainer.state import checkpoint
from allometry.trainer.train import train
from run_folders import events

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
FULL = OSError(28, "No space left on device")


def ended(config: RunConfig, rank: int, place: str) -> str:
    """(On each rank) outcome of a run with one rank's disk full at one ``place``."""
    patches = [patch.object(save, "RETRY_AFTER_S", (0.0,))]
    if int(os.environ["RANK"]) == rank:
        holder = checkpoint if place == "seal" else checkpoint.ShardWriter
        patches.append(patch.object(holder, place, side_effect=FULL))
    for one in patches:
        one.start()
    try:
        train(config, device=torch.device("cpu"), callbacks=[])
    except UserError as error:
        return str(error)
    finally:
        for one in patches:
            one.stop()
    return "trained"


@pytest.mark.parametrize(("rank", "place"), [(1, "write_data"), (0, "seal")])
def test_all_ranks_say_that_the_last_checkpoint_failed(
    tiny: Make, run_ranks: Ranks, rank: int, place: str
) -> None:
    config = tiny("training.total_steps=4", "checkpoint.every_steps=null")
    said = run_ranks(ended, 2, config, rank, place)
    assert said[0] == said[1]
    assert "step 4: the last checkpoint could not be written (No space left on device: a" in said[0]
    found = events(Path(config.run.folder))
    assert [event["event"] for event in found] == ["started", *["checkpoint_failed"] * 2]
