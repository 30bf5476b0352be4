"""Checkpoints on full disks: warning in advance, retries, and an error code."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.loader import dump
from allometry.configs.run import RunConfig
from allometry.trainer import save
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.record.writer import Recorder
from allometry.trainer.state import checkpoint, room
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train
from disks import mounted
from run_folders import events, rows

Make = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "RETRY_AFTER_S", (0.0, 0.0))


def run(config: RunConfig, *callbacks: Callback, **options: Any) -> Path:
    train(config, device=torch.device("cpu"), callbacks=list(callbacks), **options)
    return Path(config.run.folder)


def saved(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.saved(RunFolder(folder))]


def fail(monkeypatch: pytest.MonkeyPatch, *names: str, number: int = 28) -> list[str]:
    """Make saves of these folders fail, once per occurrence; return the attempts."""
    real, left, tried = checkpoint.ShardWriter, list(names), list[str]()

    class Full(real):  # type: ignore[misc, valid-type]
        def write_data(self, *args: Any, **kwargs: Any) -> Any:
            name = Path(self.path).name.removeprefix(".").removesuffix(".partial")
            tried.append(name)
            if name in left:
                left.remove(name)
                raise OSError(number, os.strerror(number))
            return super().write_data(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "ShardWriter", Full)
    return tried


@pytest.mark.parametrize("stop", [None, 12])
def test_the_last_checkpoint_is_tried_again(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    last = stop or 20
    fail(monkeypatch, *[f"step-{last}"] * 2)
    folder = run(tiny("checkpoint.every_steps=null"), stop_at_step=stop)
    assert saved(folder) == [f"step-{last}"]
    kinds = [event["event"] for event in events(folder)]
    assert kinds[-4:-1] == ["checkpoint_failed", "checkpoint_failed", "checkpoint_saved"]


@pytest.mark.parametrize("stop", [None, 12])
def test_a_run_without_its_last_checkpoint_is_no_success(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, stop: int | None
) -> None:
    last = stop or 20
    fail(monkeypatch, *[f"step-{last}"] * 3)
    config = tiny("checkpoint.every_steps=10")
    size = room.checkpoint_bytes(config)
    said = rf"step {last}: the last .* \(No space left on device: a checkpoint takes .* step-10 is"
    with pytest.raises(UserError, match=said):
        run(config, stop_at_step=stop)
    folder = Path(config.run.folder)
    failed = [event for event in events(folder) if event["event"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [last] * 3
    assert all(event["needed_bytes"] == size for event in failed)
    assert not {"finished", "stopped"} & {event["event"] for event in events(folder)}
    monkeypatch.undo()
    run(config)
    assert [event["step"] for event in events(folder) if event["event"] == "resumed"] == [10]
    assert events(folder)[-1]["event"] == "finished"


def test_a_failed_save_is_not_tried_again_with_later_weights(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fail(monkeypatch, "step-10", "step-15", number=5)
    folder = run(tiny("checkpoint.keep_last=9"))
    assert tried == ["step-5", "step-10", "step-15", "step-20"]
    assert saved(folder) == ["step-5", "step-20"]
    failed = [event for event in events(folder) if event["event"] == "checkpoint_failed"]
    assert [event["reason"] for event in failed] == ["Input/output error"] * 2


@pytest.mark.parametrize(
    ("keep", "before", "after"),
    [(3, ["step-3", "step-6", "step-9"], ["step-6", "step-9"]), (1, ["step-9"], ["step-9"])],
)
def test_a_full_disk_lets_go_of_what_the_save_would_have_replaced(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, keep: int, before: list[str], after: list[str]
) -> None:
    fail(monkeypatch, "step-12")
    changes = ("checkpoint.every_steps=3", "checkpoint.asynchronous=false")
    config = tiny(f"checkpoint.keep_last={keep}", *changes)
    seen: dict[int, list[str]] = {}

    class See(Callback):
        def before_step(self, step: int) -> None:
            seen[step] = saved(Path(config.run.folder))

    run(config, See(), stop_at_step=13)
    assert (seen[12], seen[13]) == (before, after)


def test_what_latest_names_is_never_given_up(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the pointer is written: the new folder is not yet the newest."""
    real = checkpoint.write_atomically

    def full(path: Path, text: str) -> None:
        if path.name == "latest" and text in ("step-9\n", "step-12\n"):
            raise OSError(28, os.strerror(28))
        real(path, text)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    config = tiny("checkpoint.every_steps=3", "training.total_steps=12")
    with pytest.raises(UserError, match=r"step 12: the last .* step-6 is kept"):
        run(config)
    folder = Path(config.run.folder)
    assert (folder / "latest").read_text() == "step-6\n"
    assert "step-6" in saved(folder)
    monkeypatch.undo()
    run(config)
    assert [event["step"] for event in events(folder) if event["event"] == "resumed"] == [6]


@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_the_size_of_a_checkpoint_is_known_before(tiny: Make, kind: str) -> None:
    """At most the actual size: a run with enough space is never refused."""
    config = tiny(f"optimizer={{kind: {kind}, lr: 1e-2}}", "model.width=128")
    folder = run(config, stop_at_step=1)
    actual = sum(file.stat().st_size for file in folder.glob("checkpoints/step-1/*"))
    assert 0.9 * actual < room.checkpoint_bytes(config) <= actual


@pytest.mark.parametrize("resumed", [False, True])
def test_no_room_is_said_before_the_first_step(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    config = tiny()
    folder = Path(config.run.folder)
    if resumed:
        run(config, stop_at_step=5)
    needed = room.checkpoint_bytes(config)
    monkeypatch.setattr(room, "free_bytes", lambda path: needed - 1)
    with pytest.raises(UserError, match=r"free, and a checkpoint takes .* free space there or"):
        run(config)
    assert folder.exists() == resumed
    if resumed:
        assert len(rows(folder)) == 5
    monkeypatch.setattr(room, "free_bytes", lambda path: None)  # a system without this information
    run(config)
    monkeypatch.setattr(room, "free_bytes", lambda path: 0)
    run(config)  # the run is finished and needs no more space


def test_room_for_fewer_than_are_kept_is_a_warning(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny("checkpoint.keep_steps=[2]")
    needed = room.checkpoint_bytes(config)
    caplog.set_level(logging.WARNING)
    # Steps 2, 5, 10, 15, 20: step 2 stays, two are kept, one is being written.
    for free, step, there, said in ((4, 0, 0, False), (3, 0, 0, True), (1, 17, 3, False)):
        caplog.clear()
        monkeypatch.setattr(room, "free_bytes", lambda path, free=free: free * needed)
        room.check_room(Path(), config, there, step, 20)
        assert ("4 more checkpoints" in caplog.text) == said
        assert bool(caplog.text) == said


LIMITED = """
import resource, signal, sys
from allometry.launch.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
main(["train", *sys.argv[2:], "--allocator", "system"])
"""


def test_the_reason_is_the_systems_and_the_code_is_not_0(tiny: Make, tmp_path: Path) -> None:
    """torch's own writer prints ``unexpected pos 704 vs 598`` on a full disk."""
    config = tiny()
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "100000", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    said = "step 20: the last checkpoint could not be written (File too large); there is none"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    failed = [e for e in events(Path(config.run.folder)) if e["event"] == "checkpoint_failed"]
    assert {event["reason"] for event in failed} == {"File too large"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 1 MB."""
    with mounted(tmp_path / "disk", "1m") as place:
        yield place


def test_a_disk_that_is_really_full(tiny: Make, small_disk: Path) -> None:
    """Two checkpoints of 0.36 MB fit, a third does not: the oldest is removed for the next."""
    folder = run(tiny("record.tensorboard=true", folder=small_disk / "run"))
    failed = [event for event in events(folder) if event["event"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == [15]
    assert failed[0]["reason"].startswith("No space left on device: a checkpoint takes 0.")
    assert saved(folder) == ["step-10", "step-20"]
    with pytest.raises(UserError, match="free, and a checkpoint takes"):
        run(tiny("model.width=128", folder=small_disk / "other"))
    assert not (small_disk / "other").exists()


def test_rows_that_cannot_be_written_are_no_success(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recorder, "close", lambda self: "3 rows of m could not be written (full)")
    with pytest.raises(UserError, match=r"3 rows of m could not be written \(full\)"):
        run(tiny("training.total_steps=5"))
