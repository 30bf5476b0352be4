"""A launch with restarted ranks: its record, and the state that it resumes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]


def test_a_restart_goes_on_with_the_run_of_its_own_launch(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("training.total_steps=6", "checkpoint.every_steps=3", "run.resume=never")
    train(config, callbacks=[], stop_at_step=3)
    with pytest.raises(UserError, match=r"run\.resume=never"):
        train(config, callbacks=[])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ALLOMETRY_RESTART", '[2, "rank 0 was ended by SIGKILL"]')
    train(config, callbacks=[])
    folder = Path(config.run.folder)
    said = [event | {"time": 0} for event in events(folder) if event["event"] == "restarted"]
    assert said == [
        {
            "event": "restarted",
            "time": 0,
            "step": 3,
            "count": 2,
            "reason": "rank 0 was ended by SIGKILL",
        }
    ]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
