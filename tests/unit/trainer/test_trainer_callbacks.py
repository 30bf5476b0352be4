"""What watches a run: the printed lines, TensorBoard, Weights & Biases."""

import io
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.execution import WandB
from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Display, WeightsAndBiases
from allometry.trainer.record.format import duration, human
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train

Make = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (999, "999"), (1500, "1.5k"), (25_165_824, "25.2M"), (3e12, "3T")],
)
def test_numbers_for_people(number: float, text: str) -> None:
    assert human(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3s"), (61, "1m01s"), (3700, "1h01m"), (90000, "1d01h"), (59.7, "1m00s")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_display_prints_lines_a_log_can_hold(tiny: Make) -> None:
    out = io.StringIO()
    train(tiny(), device=torch.device("cpu"), callbacks=[Display(5, out)])
    lines = out.getvalue().splitlines()
    assert "parameters" in lines[0]
    steps = [line for line in lines if line.startswith("step") and "| loss" in line]
    assert [int(line.split("/")[0].removeprefix("step")) for line in steps] == [1, 5, 10, 15, 20]
    assert any("validation loss: up" in line for line in lines)
    assert "checkpoint saved" in out.getvalue()
    assert "\r" not in out.getvalue()


def test_tensorboard_holds_the_rows(tiny: Make) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny("record.tensorboard=true", "record.display_every_steps=5")
    train(config, device=torch.device("cpu"))
    events = EventAccumulator(str(Path(config.run.folder) / "tb"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [5, 10, 15, 20]
    assert {"loss/up", "validation/down", "train/lr"} <= set(events.Tags()["scalars"])


def test_wandb_that_is_asked_for_and_absent_is_an_error(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"record\.wandb.*pip install"):
        train(tiny("record.wandb={project: p}"), device=torch.device("cpu"))


def test_wandb_continues_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[int] = []

    class Page:
        def log(self, row: dict[str, Any], step: int) -> None:
            logged.append(step)

        def finish(self) -> None:
            pass

    fake: Any = types.ModuleType("wandb")
    fake.Error = RuntimeError
    fake.init = lambda **options: opened.append(options) or Page()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        callback = WeightsAndBiases(WandB(project="p"), RunFolder(tmp_path))
        callback.on_start({}, step)
        callback.on_row({"step": step, "loss": 1.0})
        callback.on_end()
    assert opened[0]["id"] == opened[1]["id"]
    assert opened[1]["resume"] == "allow"
    assert logged == [1, 2]


def test_wandb_takes_the_rows_of_a_run(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny("record.wandb={project: p}", "training.total_steps=6")
    for stop in (3, None):
        train(config, device=torch.device("cpu"), stop_at_step=stop)
    pages = list(Path(config.run.folder).glob("wandb/offline-run-*/*.wandb"))
    identity = (Path(config.run.folder) / "wandb_id").read_text()
    assert [page.name for page in pages] == [f"run-{identity}.wandb"] * 2
    until = time.monotonic() + 60.0  # the package's own process may write on after it said it ended
    while not all(b"loss/down" in page.read_bytes() for page in pages):
        assert time.monotonic() < until, [page.stat().st_size for page in pages]
        time.sleep(0.2)


def test_wandb_that_cannot_be_reached_is_an_error(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**options: Any) -> None:
        raise fake.Error("api_key not configured\n(no-tty)")

    fake: Any = types.ModuleType("wandb")
    fake.Error, fake.init = type("Error", (Exception,), {}), unreachable
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(UserError, match=r"^record\.wandb: .*\(api_key not configured \(no-tty\)\)"):
        train(tiny("record.wandb={project: p}"), device=torch.device("cpu"))
