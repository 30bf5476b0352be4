"""Observers of a run: the printed lines, TensorBoard, Weights & Biases."""

import importlib.util
import io
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.format import duration, human
from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Display
from allometry.trainer.train import train
from wandb_file import history

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


def test_a_branch_has_the_history_of_its_trunk(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    both = ["record.tensorboard=true", "record.display_every_steps=2"]
    if importlib.util.find_spec("wandb"):
        both.append("record.wandb={project: p}")
    trunk = ("schedule={kind: constant, warmup_steps: 3}", "checkpoint.keep_steps=[8]", *both)
    train(tiny(*trunk, folder=tmp_path / "trunk"), device=torch.device("cpu"), stop_at_step=10)
    parent = f"run.parent={{folder: {tmp_path}/trunk, step: 8}}"
    branch = tiny(parent, "training.total_steps=12", *both, folder=tmp_path / "branch")
    for stop in (10, None):
        train(branch, device=torch.device("cpu"), stop_at_step=stop)
    shown = EventAccumulator(str(tmp_path / "branch/tb"))
    shown.Reload()
    assert [scalar.step for scalar in shown.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]
    for page in wandb_pages(tmp_path / "branch").values():
        assert [steps(rows) for rows in page] == [list(range(1, 11)), [11, 12]]


def test_wandb_that_is_asked_for_and_absent_is_an_error(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"record\.wandb.*pip install"):
        train(tiny("record.wandb={project: p}"), device=torch.device("cpu"))


def wandb_pages(folder: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the rows of each launch, by W&B's id of their page."""
    pages: dict[str, list[list[dict[str, Any]]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=os.path.getmtime):
        pages.setdefault(path.stem.removeprefix("run-"), []).append(history(path))
    return pages


def steps(rows: list[dict[str, Any]]) -> list[int]:
    assert all(row["_step"] == row["step"] for row in rows)
    return [row["step"] for row in rows]


def test_wandb_continues_its_page(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real package, offline: its records of launches, crashes and going back."""
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny("record.wandb={project: p}", "training.total_steps=8", "checkpoint.every_steps=2")
    folder = Path(config.run.folder)
    train(config, device=torch.device("cpu"), stop_at_step=4)
    shutil.copytree(folder, tmp_path / "at-4")
    train(config, device=torch.device("cpu"), stop_at_step=6)
    page = (folder / "wandb_id").read_text()
    assert [steps(rows) for rows in wandb_pages(folder)[page]] == [[1, 2, 3, 4], [5, 6]]
    # A crash after step 6, before its checkpoint: steps 5 and 6 are taken and logged again.
    for name in ("checkpoints", "latest", "metrics.jsonl"):
        (shutil.rmtree if name == "checkpoints" else os.unlink)(folder / name)
        copy = shutil.copytree if name == "checkpoints" else shutil.copy
        copy(tmp_path / "at-4" / name, folder / name)
    train(config, device=torch.device("cpu"))
    assert wandb_pages(folder).keys() == {page}
    _, second, third = wandb_pages(folder)[page]
    assert (steps(second), steps(third)) == ([5, 6], [5, 6, 7, 8])
    keys = ("loss", "grad_norm", "lr", "tokens")
    assert [[row[k] for k in keys] for row in second] == [
        [row[k] for k in keys] for row in third[:2]
    ]
    # After going back the steps differ from the page: a new page, with the earlier rows.
    back = tiny(
        *("record.wandb={project: p}", "training.total_steps=8", "run.resume=step-6"),
        "checkpoint.every_steps=3",
    )
    train(back, device=torch.device("cpu"))
    other = (folder / "wandb_id").read_text()
    assert other != page
    assert [steps(rows) for rows in wandb_pages(folder)[other]] == [[1, 2, 3, 4, 5, 6, 7, 8]]


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
