"""A run that forecasts its own final loss: rows, events, and unchanged training."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.trainer.record.callbacks import Callback, Display, Reporter
from allometry.trainer.record.forecast import Forecaster
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
CPU = torch.device("cpu")
KEYS = ("forecast/loss", "forecast/low", "forecast/high")
LONG = ("training.total_steps=60", "record.display_every_steps=1000")


def run(config: RunConfig, **options: Any) -> Path:
    train(config, device=CPU, **options)
    return Path(config.run.folder)


def forecasts(folder: Path) -> dict[int, tuple[float, ...]]:
    return {row["step"]: tuple(row[key] for key in KEYS) for row in rows(folder) if KEYS[0] in row}


def kinds(folder: Path) -> list[str]:
    return [event["event"] for event in events(folder)]


def test_forecasts_are_logged_and_change_nothing(tiny: Make, tmp_path: Path) -> None:
    with_them = run(tiny(*LONG, "record.forecast.every_steps=10", folder=tmp_path / "with"))
    without = run(tiny(*LONG, "record.forecast.every_steps=null", folder=tmp_path / "without"))
    found = forecasts(with_them)
    assert list(found) == [30, 40, 50, 60]  # 20 rows after the warm-up are needed
    assert all(low < loss < high for loss, low, high in found.values())
    reasons = [event for event in events(with_them) if event["event"] == "no_forecast"]
    assert [event["step"] for event in reasons] == [10]
    assert "a forecast needs 20" in reasons[0]["reason"]
    assert kinds(with_them).count("forecast_from_prior") == 1  # no rate has fallen by step 42
    assert not forecasts(without)
    assert "no_forecast" not in kinds(without)
    assert [row["loss"] for row in rows(with_them)] == [row["loss"] for row in rows(without)]


def test_a_resumed_run_forecasts_the_same(tiny: Make, tmp_path: Path) -> None:
    every = "record.forecast.every_steps=20"
    straight = run(tiny(*LONG, every, folder=tmp_path / "straight"))
    run(tiny(*LONG, every, folder=tmp_path / "stopped"), stop_at_step=33)
    stopped = run(tiny(*LONG, every, folder=tmp_path / "stopped"))
    assert forecasts(stopped) == forecasts(straight)
    assert list(forecasts(stopped)) == [40, 60]
    assert [row["loss"] for row in rows(stopped)] == [row["loss"] for row in rows(straight)]


def make(tiny: Make, folder: Path, every: int = 100) -> tuple[Forecaster, list[Any]]:
    said: list[Any] = []
    config = tiny("schedule={kind: cosine, warmup_steps: 20}", "training.total_steps=400")
    listener = Callback()
    listener.on_event = lambda kind, details: said.append((kind, details))  # type: ignore[method-assign]
    report = Reporter(None, [listener])
    return Forecaster(every, config, 0, RunFolder(folder), report), said


def step_of(step: int, loss: float) -> Any:
    return SimpleNamespace(step=step, loss=loss, recorded=True)


def test_the_first_row_at_or_after_its_turn_has_the_forecast(tiny: Make, tmp_path: Path) -> None:
    forecaster, said = make(tiny, tmp_path)
    forecaster.on_start({}, 1)
    with_it = [
        step for step in range(3, 400, 3) if forecaster.additions(step_of(step, 3.0 + 20.0 / step))
    ]
    assert with_it == [102, 201, 300]
    assert [kind for kind, _ in said] in ([], ["forecast_from_prior"])


def test_a_curve_that_cannot_be_fitted_is_an_event(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecaster, said = make(tiny, tmp_path, every=1)
    forecaster.on_start({}, 1)

    def broken(*_: Any, **__: Any) -> None:
        raise FloatingPointError("no number")

    monkeypatch.setattr("allometry.trainer.record.forecast.forecast", broken)
    for step in range(1, 5):
        assert forecaster.additions(step_of(step, 3.0)) == {}
    assert said == [("no_forecast", {"step": 1, "reason": "no number"})]


def test_earlier_launches_are_read_up_to_the_first_step(tiny: Make, tmp_path: Path) -> None:
    lines = [{"step": step, "lr": 1e-2, "loss": 3.0 + 20.0 / step} for step in range(1, 151)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    forecaster, _ = make(tiny, tmp_path)
    forecaster.on_start({}, 121)
    for row in lines[120:]:
        assert not forecaster.additions(step_of(row["step"], row["loss"]))
    for step in range(151, 200):
        assert not forecaster.additions(step_of(step, 3.0 + 20.0 / step))
    found = forecaster.additions(step_of(200, 3.1))
    whole, _ = make(tiny, tmp_path / "other")
    whole.on_start({}, 1)
    expected: dict[str, Any] = {}
    for step in range(1, 201):
        loss = 3.0 + 20.0 / step if step < 200 else 3.1
        expected = whole.additions(step_of(step, loss)) or expected
    assert found == expected
    assert set(found) == set(KEYS)


def test_the_display_prints_it() -> None:
    out = io.StringIO()
    row = {"step": 7, KEYS[0]: 3.21, KEYS[1]: 3.1, KEYS[2]: 3.3}
    Display(1000, out).on_row(row)
    assert out.getvalue() == "step 7 | forecast of the final loss: 3.2100 (3.1000 to 3.3000)\n"
