"""Seconds of steps on an asynchronous and on a synchronous device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer import train as training
from allometry.trainer.evaluate import Evaluator
from allometry.trainer.record import timing
from allometry.trainer.state.checkpoint import Checkpointer
from allometry.trainer.step import TrainStep
from run_folders import rows

Make = Callable[..., RunConfig]
STEP, EVALUATION, SAVE, HOST = 1.0, 50.0, 30.0, 0.01
SETTINGS = ("training.total_steps=12", "evaluation.every_steps=5", "checkpoint.every_steps=4")
READ_AT_ONCE = {4, 5, 8, 10, 12}


class Device:
    """Queue: the host continues while the device runs its work, one item after another."""

    def __init__(self, *, behind: bool) -> None:
        self.host = self.done = 0.0
        self.behind = behind
        self.queued_steps = 0
        self.read: dict[int, int] = {}  # number of steps queued at each read

    def queue(self, seconds: float) -> None:
        self.host += HOST
        self.done = max(self.host, self.done) + seconds
        if not self.behind:
            self.wait(self.done)

    def wait(self, until: float) -> None:
        self.host = max(self.host, until)


class Clock(timing.Clock):
    """Marks that report when the device reaches them, like a GPU's events."""

    lag = 1

    def __init__(self, device: Device) -> None:
        self._device = device

    def mark(self) -> float:
        return max(self._device.host, self._device.done)

    def seconds(self, start: float, end: float) -> float:
        self._device.wait(end)
        return end - start


@pytest.fixture(params=["behind", "at once"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Replace the clock of a run by a simulated device."""
    made = Device(behind=request.param == "behind")
    if made.behind:
        monkeypatch.setattr(training, "clock_of", lambda _: Clock(made))
    else:
        fake = SimpleNamespace(perf_counter=lambda: made.host)
        monkeypatch.setattr(timing, "time", fake)
    take, evaluate, save = TrainStep.__call__, Evaluator.__call__, Checkpointer.save
    finish = training.Loop._finish_step

    def step(self: TrainStep, number: int, batches: Any) -> Any:
        made.queued_steps = number
        made.queue(STEP)
        return take(self, number, batches)

    def evaluation(self: Evaluator) -> dict[str, float]:
        made.queue(EVALUATION)
        made.wait(made.done)
        return evaluate(self)

    def saving(self: Checkpointer, *args: Any) -> None:
        made.host = max(made.host, made.done) + SAVE
        save(self, *args)

    def reading(self: Any, queued: Any) -> None:
        made.read[queued.outcome.step] = made.queued_steps
        finish(self, queued)

    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(Evaluator, "__call__", evaluation)
    monkeypatch.setattr(Checkpointer, "save", saving)
    monkeypatch.setattr(training.Loop, "_finish_step", reading)
    return made


def test_each_row_has_the_seconds_of_its_own_step(tiny: Make, device: Device) -> None:
    config = tiny(*SETTINGS)
    training.train(config, device=torch.device("cpu"), callbacks=[])
    found = rows(Path(config.run.folder))
    assert [row["time_s"] for row in found] == pytest.approx([STEP] * 12, abs=3 * HOST)
    assert "validation/up" in found[4]
    for row in found:
        assert row["tokens_per_s"] == pytest.approx(8 * 32 / row["time_s"])
    behind = {step: step if step in READ_AT_ONCE else step + 1 for step in range(1, 13)}
    assert device.read == (behind if device.behind else {step: step for step in range(1, 13)})


def test_reading_a_step_waits_for_no_later_one() -> None:
    device = Device(behind=True)
    timer = timing.StepTimer(Clock(device))
    timer.start()
    device.queue(STEP)
    first = timer.lap()
    device.queue(STEP)
    second = timer.lap()
    assert timer.seconds(first) == pytest.approx(STEP + HOST)
    assert device.host == pytest.approx(STEP + HOST), "the second is still running"
    assert timer.seconds(second) == pytest.approx(STEP)


def test_pauses_are_left_out_even_if_they_fail() -> None:
    device = Device(behind=False)
    timer = timing.StepTimer(Clock(device))
    timer.start()
    device.queue(STEP)

    def fails() -> None:
        with timer.paused():
            device.queue(EVALUATION)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    with timer.paused():
        device.queue(EVALUATION)
    device.queue(STEP)
    assert timer.seconds(timer.lap()) == pytest.approx(2 * (STEP + HOST))


def test_numbers_on_a_cpu_are_read_where_they_are() -> None:
    tensor = torch.arange(3.0)
    assert timing.to_host(tensor) is tensor
    assert isinstance(timing.clock_of(torch.device("cpu")), timing.HostClock)
