"""Runs with optimizer states in a file: broken disks, killed processes, dry runs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.optim.offload.swap import SwapFile
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]


def config(tiny: Make, folder: Path, *more: str, **states: Any) -> RunConfig:
    import json

    states = {"nvme": str(folder.parent / "swap"), "bucket_mib": 0.05} | states
    return tiny(
        f"parallel.zero.optimizer_states={json.dumps(states)}",
        *("model.width=64", "model.ffn_width=160", *more),
        folder=folder,
    )


def launch(run: RunConfig) -> None:
    train(run, device=torch.device("cpu"), callbacks=[])


@pytest.mark.parametrize(
    ("call", "said"),
    [("_pwrite", "No space left on device"), ("_pread", "Input/output error"), ("lost", "written")],
)
def test_a_disk_that_breaks_ends_the_run_with_its_checkpoint_named(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, said: str
) -> None:
    run = config(tiny, tmp_path / "run")
    method = "_pwrite" if call == "lost" else call
    inner, calls = getattr(SwapFile, method), [0]

    def breaking(self: SwapFile, data: Any, start: int) -> int:
        calls[0] += (tmp_path / "run" / "latest").exists()  # once a checkpoint exists
        if calls[0] < 10:
            return int(inner(self, data, start))
        if call == "lost":
            return len(data)
        raise OSError(5 if call == "_pread" else 28, said)

    monkeypatch.setattr(SwapFile, method, breaking)
    with pytest.raises(UserError, match=rf"^step \d+: .*optimizer_states.nvme=.*{said}; ") as error:
        launch(run)
    saved = [event["step"] for event in events(tmp_path / "run") if "saved" in event["event"]]
    assert saved
    assert f"checkpoint step-{saved[-1]} is kept" in str(error.value)
    monkeypatch.undo()
    launch(run)
    straight = config(tiny, tmp_path / "straight")
    launch(straight)
    losses = [[row["loss"] for row in rows(Path(r.run.folder))] for r in (run, straight)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 20


def test_a_disk_that_breaks_while_states_are_loaded_keeps_the_checkpoint(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tiny, tmp_path / "run")
    train(run, device=torch.device("cpu"), callbacks=[], stop_at_step=5)

    def full(self: SwapFile, data: Any, start: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SwapFile, "_pwrite", full)
    with pytest.raises(UserError, match=r"^step 6: writing .*No space.*; checkpoint step-5 is kep"):
        launch(run)
    monkeypatch.undo()
    launch(run)
    assert len(rows(tmp_path / "run")) == 20


def killed(run: RunConfig, at: int) -> None:
    """Train, and kill the process during a write of the swap file."""
    inner, calls = SwapFile._pwrite, [0]

    def dying(self: SwapFile, data: Any, start: int) -> int:
        calls[0] += 1
        if calls[0] == at:
            inner(self, data[:4096], start)
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, data, start)

    SwapFile._pwrite = dying  # type: ignore[method-assign]
    launch(run)


ALL_AWAY = (
    "training.compute_dtype=bf16",
    "parallel.zero.stage=3",
    "parallel.zero.optimizer_states.master_weights=true",
    "parallel.zero.optimizer_states.gradients=true",
)


@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.slow), ALL_AWAY])
def test_kill_9_during_a_write_loses_nothing(
    tiny: Make, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = config(tiny, tmp_path / "run", *more)
    for at in (100, 60):
        process = get_context("spawn").Process(target=killed, args=(run, at))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert not list((tmp_path / "swap").iterdir())
    launch(run)
    same = [each for each in more if "optimizer_states" not in each]
    straight = tiny("model.width=64", "model.ffn_width=160", *same, folder=tmp_path / "straight")
    launch(straight)
    losses = [[row["loss"] for row in rows(Path(r.run.folder))] for r in (run, straight)]
    assert losses[0] == losses[1]


def test_what_is_not_finite_is_named_where_nothing_is_on_the_device(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The placeholder of an offloaded parameter is NaN."""
    from allometry.optim.offload.gradients import HostGradients

    inner = HostGradients._leave

    def broken(self: HostGradients, parameter: Any) -> None:
        if tuple(parameter.shape) == (160, 64):
            parameter.grad._local_tensor[3, 5] = float("nan")
        inner(self, parameter)

    monkeypatch.setattr(HostGradients, "_leave", broken)
    with pytest.raises(UserError, match=r"not finite in parameter group\(s\) hidden;"):
        launch(config(tiny, tmp_path / "run", *ALL_AWAY))


def test_the_record_says_where_states_are(tiny: Make, tmp_path: Path) -> None:
    run = config(tiny, tmp_path / "run", device=0.25, cpu=0.25)
    launch(run)
    said = next(one for one in events(tmp_path / "run") if one["event"] == "optimizer_states")
    sizes = [said[f"{tier}_bytes"] for tier in ("device", "cpu", "nvme")]
    assert all(sizes)
    assert sizes[0] < 0.35 * sum(sizes)
    assert sizes[1] < 0.3 * sum(sizes)


def test_a_full_disk_is_found_before_anything_starts(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"nvme=.*: No space left on device; .* choose another"):
        launch(config(tiny, tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.undo()
    launch(config(tiny, tmp_path / "run"))


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ("{optimizer_states: {cpu: 0.5}}", "nothing takes the rest; name a folder in nvme"),
        ("{optimizer_states: {device: 1.0}}", "leave optimizer_states out"),
        ("{optimizer_states: {device: 2.0}}", "device"),
        ("{optimizer_states: {device: 2 GB}}", "device"),
        ("{stage: 1, offload: cpu, optimizer_states: {}}", "set its nvme and leave its device"),
        ("{optimizer_states: {nvme: ''}}", "nvme"),
        ("{optimizer_states: {master_weights: true}}", "set stage to 1, 2 or 3"),
        ("{optimizer_states: {gradients: true}}", "set stage to 1, 2 or 3"),
        (
            "{stage: 1, offload: cpu, optimizer_states: {nvme: x, gradients: true}}",
            "is what offload=cpu does",
        ),
        (
            "{stage: 3, optimizer_states: {master_weights: true}}",
            "set training.compute_dtype: bf16",
        ),
        ("{optimizer_states: {bucket_mib: 0}}", "bucket_mib"),
    ],
)
def test_what_cannot_be_is_refused(tiny: Make, zero: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        tiny(f"parallel.zero={zero}")
    assert "optimizer_states" in str(error.value) or "zero" in str(error.value)


def test_the_record_names_the_disk_and_what_speaks_against_it(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allometry.parallel.folder import FileSystem

    monkeypatch.setattr(FileSystem, "of", lambda folder: FileSystem("/net", "nfs4"))
    run = config(tiny, tmp_path / "run")
    train(run, device=torch.device("cpu"), callbacks=[], stop_at_step=1)
    said = {one["event"]: one for one in events(tmp_path / "run")}
    place = said["optimizer_states"]
    assert (place["mount"], place["file_system"]) == ("/net", "nfs4")
    assert place["folder"] == str(tmp_path / "swap")
    assert "over the network" in said["states_disk"]["note"]


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_disk_is_said_once(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    from allometry.trainer.record.disk import SlowDisk

    monkeypatch.setattr(SlowDisk, "STEPS", 4)
    monkeypatch.setattr(SlowDisk, "SHARE", 0.2 if slow else 0.99)
    inner = SwapFile._pread

    def late(self: SwapFile, data: Any, start: int) -> int:
        time.sleep(0.02 if slow else 0.0)
        return inner(self, data, start)

    monkeypatch.setattr(SwapFile, "_pread", late)
    launch(config(tiny, tmp_path / "run"))
    said = [one for one in events(tmp_path / "run") if one["event"] == "slow_disk"]
    assert len(said) == slow
    if slow:
        assert said[0]["step"] == SlowDisk.FIRST + 4
        assert said[0]["waited_percent"] > 20
        assert 0 < said[0]["gb_per_s"] < 1
