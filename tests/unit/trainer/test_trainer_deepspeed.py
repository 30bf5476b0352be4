"""Runs of the deepspeed engine on one process: failures, and the record."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.parallel.deepspeed.engine import DeepSpeedSync
from allometry.parallel.deepspeed.files import CheckedHandle
from allometry.trainer.train import train
from deepspeed_cases import STEADY, assert_close, losses, needs_deepspeed, needs_nvme
from run_folders import events, rows

Make = Callable[..., RunConfig]


def engine(stage: int, **more: Any) -> str:
    return f"parallel.zero={json.dumps({'engine': 'deepspeed', 'stage': stage, **more})}"


def launch(run: RunConfig, stop_at_step: int | None = None) -> None:
    train(run, device=torch.device("cpu"), callbacks=[], stop_at_step=stop_at_step)


def test_without_the_package_a_run_is_refused_and_leaves_no_folder(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def absent(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"needs DeepSpeed 0.19.8, which is not installed; pip"):
        launch(tiny(engine(3), folder=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    launch(tiny("parallel.zero.stage=3", folder=tmp_path / "run"), 1)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("offload", ["none", pytest.param("cpu", marks=pytest.mark.slow)])
def test_gradients_that_are_not_finite_end_the_run_with_their_groups(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, offload: str
) -> None:
    backward, calls = DeepSpeedSync.backward, [0]

    def poisoned(self: DeepSpeedSync, loss: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 29:  # 4 micro-batches per step
            weight = self._model.final_norm.weight
            weight.register_hook(lambda gradient: gradient * math.nan)
        backward(self, loss)

    monkeypatch.setattr(DeepSpeedSync, "backward", poisoned)
    run = tiny(*STEADY, engine(stage, offload=offload), folder=tmp_path / "run")
    said = r"step 8: .*gradient norm inf, .*parameter group\(s\) vector; .*step-5 is kept"
    with pytest.raises(UserError, match=said):
        launch(run)
    monkeypatch.undo()
    launch(run)
    assert len(rows(tmp_path / "run")) == 20


@needs_deepspeed
def test_the_record_says_what_monitors_can_see(tiny: Make, tmp_path: Path) -> None:
    watched = ("record.monitors.every_steps=5", "record.monitors.singular_values_every_steps=5")
    run = tiny(*STEADY, engine(3), *watched, folder=tmp_path / "run")
    launch(run)
    (limited,) = [e for e in events(tmp_path / "run") if e["event"] == "monitors_limited"]
    assert limited["to"] == "activations and outputs"
    row = rows(tmp_path / "run")[4]
    assert row["monitors/activation_max"] > 0
    plain = tiny(*STEADY, *watched, folder=tmp_path / "plain")
    launch(plain)
    all_of_it = {key for key in rows(tmp_path / "plain")[4] if key.startswith("monitors/")}
    absent = {key.split("/")[1] for key in all_of_it - row.keys()}
    assert absent == set(limited["absent"].split(", "))
    assert_close(run, plain)
    (held,) = [e for e in events(tmp_path / "run") if e["event"] == "optimizer_states"]
    assert held["device_bytes"] == 0
    assert held["cpu_bytes"] > 0 == held["nvme_bytes"]


@needs_deepspeed
def test_a_branch_of_a_run_with_states_in_fp8_says_what_reads_them(
    tiny: Make, tmp_path: Path
) -> None:
    parent = tiny('optimizer.states={"kind": "fp8"}', folder=tmp_path / "parent")
    launch(parent, 5)
    link = {"folder": str(tmp_path / "parent"), "step": 5, "changes": ["optimizer.states"]}
    whence = json.dumps(link)
    branch = tiny(f"run.parent={whence}", engine(1), folder=tmp_path / "branch")
    with pytest.raises(UserError, match=r"in FP8, which .*deepspeed cannot read; use .*fsdp2"):
        launch(branch)


LARGE = ("model.width=256", "model.ffn_width=1024", "training.total_steps=8", "optimizer.lr=1e-3")


@needs_nvme
@pytest.mark.parametrize(
    ("call", "said"), [("cut", "the file has"), ("changed", "they are not what was written")]
)
def test_a_disk_that_lies_ends_the_run_with_its_checkpoint_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, said: str
) -> None:
    zero = engine(3, optimizer_states={"nvme": str(tmp_path / "swap"), "bucket_mib": 4})
    more = (*STEADY, *LARGE, zero, "checkpoint.every_steps=3")
    run = tiny(*more, folder=tmp_path / "run")
    read, calls = CheckedHandle.async_pread, [0]

    def lying(self: CheckedHandle, buffer: Tensor, path: Any, offset: int) -> int:
        calls[0] += (tmp_path / "run" / "latest").exists()
        if calls[0] == 1:  # the first after a checkpoint
            with open(path, "r+b") as file:
                if call == "cut":
                    file.truncate(4096)
                else:
                    file.seek(5000)
                    file.write(b"other")
        return read(self, buffer, path, offset)

    monkeypatch.setattr(CheckedHandle, "async_pread", lying)
    with pytest.raises(UserError, match=rf"^step \d: .*optimizer_states.nvme=.*{said}") as error:
        launch(run)
    saved = [event["step"] for event in events(tmp_path / "run") if "saved" in event["event"]]
    assert saved
    assert f"checkpoint step-{saved[-1]} is kept" in str(error.value)
    assert not list((tmp_path / "swap").iterdir())
    monkeypatch.undo()
    launch(run)
    straight = tiny(*more, folder=tmp_path / "straight")
    launch(straight)
    assert_close(run, straight, steps=8)


def killed(run: RunConfig, at: int) -> None:
    """Train, and kill the process during a file write, ``at`` writes after a checkpoint."""
    write, calls = CheckedHandle.async_pwrite, [0]
    before = latest(run)

    def dying(self: CheckedHandle, buffer: Tensor, path: Any, offset: int) -> int:
        calls[0] += latest(run) != before
        begun = write(self, buffer, path, offset)
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return begun

    CheckedHandle.async_pwrite = dying  # type: ignore[method-assign]
    launch(run)


def latest(run: RunConfig) -> str:
    """Return the name of the last checkpoint, "" before the first."""
    path = Path(run.run.folder) / "latest"
    return path.read_text() if path.exists() else ""


@needs_nvme
@pytest.mark.parametrize(
    "offload", [pytest.param("none", marks=pytest.mark.slow), pytest.param("nvme")]
)
def test_kill_9_during_a_write_loses_nothing(tiny: Make, tmp_path: Path, offload: str) -> None:
    """Killed twice, each time after a checkpoint of that launch: files are never the only copy."""
    swap = tmp_path / "swap"
    zero = engine(3, offload=offload, optimizer_states={"nvme": str(swap), "bucket_mib": 4})
    more = (*STEADY, *LARGE, zero, "checkpoint.every_steps=2")
    run = tiny(*more, folder=tmp_path / "run")
    for at, last in ((5, "step-2"), (9, "step-4")):
        process = get_context("spawn").Process(target=killed, args=(run, at))
        process.start()
        process.join(200)
        assert process.exitcode == -signal.SIGKILL
        assert last in latest(run)
        assert len(list(swap.iterdir())) == 1  # the next launch removes this one's files
    launch(run)
    assert not list(swap.iterdir())
    straight = tiny(*more, folder=tmp_path / "straight")
    launch(straight)
    assert losses(run) == losses(straight)
    assert len(losses(run)) == 8


@needs_nvme
def test_states_too_small_for_files_are_refused(tiny: Make, tmp_path: Path) -> None:
    zero = engine(3, optimizer_states={"nvme": str(tmp_path / "swap")})
    with pytest.raises(UserError, match=r"no group of parameters takes 1 MiB on a rank"):
        launch(tiny(*STEADY, zero, folder=tmp_path / "run"))
