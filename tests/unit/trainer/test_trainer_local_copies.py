"""Local copies of one process: failures, stops, and folders of other runs."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state.local import LocalCopies
from allometry.trainer.stop import StopSignals
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, step: int) -> None:
        if step == self.step:
            raise ZeroDivisionError


def run(config: RunConfig, *callbacks: Callback, **options: Any) -> Path:
    train(config, device=torch.device("cpu"), callbacks=list(callbacks), **options)
    return Path(config.run.folder)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    place = tmp_path / "nodes"
    place.mkdir()
    return place


@pytest.fixture
def copied(tiny: Make, nodes: Path) -> RunConfig:
    """Return a run with a copy every 4 steps, and only a final checkpoint."""
    return tiny(
        f"checkpoint.local={{folder: {nodes}, every_steps: 4}}",
        *("checkpoint.every_steps=null", "checkpoint.asynchronous=false"),
    )


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(folder) if event["event"] == kind]


def crashed(config: RunConfig, step: int = 10) -> Path:
    with pytest.raises(ZeroDivisionError):
        run(config, Crash(step))
    return Path(config.run.folder)


def test_a_stop_before_the_first_step_saves_what_was_a_copy(copied: RunConfig, nodes: Path) -> None:
    folder = crashed(copied)
    assert not list(folder.glob("checkpoints/step-*"))
    with StopSignals() as signals:
        signals.received = signal.SIGTERM
        run(copied, signals=signals)
    assert [path.name for path in folder.glob("checkpoints/step-*")] == ["step-8"]
    assert not list(nodes.iterdir())
    run(copied)
    assert [event["checkpoint"] for event in told(folder, "resumed")] == ["step-8", "step-8"]
    assert [event.get("local") for event in told(folder, "resumed")] == [True, None]
    assert len(rows(folder)) == 20


def test_a_copy_that_cannot_be_written_does_not_end_the_run(
    copied: RunConfig, nodes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LocalCopies._write_own

    def full(self: LocalCopies, path: Path, step: int, *args: Any) -> None:
        if step != 4:
            raise OSError(28, os.strerror(28))
        write(self, path, step, *args)

    monkeypatch.setattr(LocalCopies, "_write_own", full)
    folder = crashed(copied, 18)
    failed = told(folder, "local_copy_failed")
    assert [event["step"] for event in failed] == [8, 12, 16]
    assert {event["reason"] for event in failed} == {"No space left on device"}
    assert [event["step"] for event in told(folder, "local_copies")] == [4]
    run(copied)  # the previous copy still exists
    assert [event["checkpoint"] for event in told(folder, "resumed")] == ["step-4"]
    assert len(rows(folder)) == 20


def test_what_is_not_finite_is_not_copied(
    copied: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = LocalCopies.staged

    def broken(self: LocalCopies, state: Any) -> Any:
        copies = staged(self, state)
        next(iter(copies.values())).view(-1)[0] = torch.nan
        return copies

    monkeypatch.setattr(LocalCopies, "staged", broken)
    folder = crashed(copied, 6)
    (failed,) = told(folder, "local_copy_failed")
    assert failed["reason"].endswith("is not finite")


def test_folders_that_others_can_write_to_are_refused(copied: RunConfig, nodes: Path) -> None:
    folder = crashed(copied)
    (place,) = nodes.iterdir()
    place.chmod(0o777)
    with pytest.raises(UserError, match=r"checkpoint\.local\.folder: .* of this user alone"):
        run(copied)
    assert [event["event"] for event in events(folder)][-1] != "resumed"


def test_a_folder_that_is_not_there_is_refused(tiny: Make, tmp_path: Path) -> None:
    config = tiny(f"checkpoint.local={{folder: {tmp_path}/none, every_steps: 4}}")
    with pytest.raises(UserError, match=r"checkpoint\.local\.folder=.*none cannot be written"):
        run(config)


def test_a_run_that_goes_back_begins_there(copied: RunConfig, tiny: Make, nodes: Path) -> None:
    """Copies of the steps that the run takes back are removed."""
    run(copied, stop_at_step=6)
    crashed(copied, 18)
    section = copied.run.model_copy(update={"resume": "step-6"})
    back = copied.model_copy(update={"run": section})
    folder = crashed(back, 7)
    assert told(folder, "resumed")[-1]["checkpoint"] == "step-6"
    run(back)  # the same command again
    assert [event["checkpoint"] for event in told(folder, "resumed")] == ["step-6"] * 3
    assert [row["step"] for row in rows(folder)] == list(range(1, 21))
