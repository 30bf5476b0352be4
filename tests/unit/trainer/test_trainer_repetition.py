"""Repetition: its value, refusals of runs, advice, and the alarm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store
from allometry.launch.runs.dry_run import planned
from allometry.trainer.record.repetition import RepetitionWatch
from allometry.trainer.repetition import LAW, repetition_advice, repetitions, worth
from allometry.trainer.sources import open_sources
from allometry.trainer.state.folder import RunFolder
from allometry.trainer.train import train
from run_folders import events, rows

Make = Callable[..., RunConfig]
TOKENS = 400 * 32  # approximate size of a source of the tiny store


def test_worth_is_the_published_law() -> None:
    """R_D = 15.39, and the resulting numbers for 2 to 40 epochs."""
    found = {epochs: worth(epochs) for epochs in (2, 4, 8, 16, 40)}
    average = [round(one, 3) for one, _ in found.values()]
    after = [round(one, 3) for _, one in found.values()]
    assert average == [0.984, 0.931, 0.828, 0.661, 0.379]
    assert after == [0.937, 0.823, 0.635, 0.377, 0.079]
    assert worth(0.5) == worth(1.0) == (1.0, 1.0)


def steps(epochs: float, config: RunConfig) -> str:
    """Return a length that reads the heavier source ``epochs`` times."""
    tokens = open_sources(config).unique_tokens()["up"]
    return f"training.total_steps={round(epochs * tokens / (0.7 * 8 * 32))}"


def test_the_table_is_of_each_source(tiny: Make) -> None:
    config = tiny(steps(8, tiny()))
    stream = open_sources(config)
    total = int(config.training.total_steps or 0) * 8
    up, down = repetitions(stream, total, 10**8)
    assert up.epochs == pytest.approx(8, rel=0.01)
    assert up.average == pytest.approx(worth(up.epochs)[0])
    assert up.last == pytest.approx(0.635, abs=0.003)
    assert (up.tokens, up.unique) == (stream.accounts(total)["up"].tokens, up.unique)
    read = up.tokens + down.tokens
    seen = read - up.tokens * (1 - up.average)
    assert up.cost == pytest.approx(LAW["B"] * (seen ** -LAW["beta"] - read ** -LAW["beta"]))
    assert up.cost > down.cost > 0
    assert [one.cost for one in repetitions(stream, total, 1000)] == [None, None]
    (only,) = repetitions(open_sources(tiny("data.sources.1.weight=0")), 10, 10**8)
    assert (only.source, only.average, only.last, only.cost) == ("up", 1.0, 1.0, 0.0)


def test_what_a_run_goes_on_after_counts(tiny: Make) -> None:
    stream = open_sources(tiny())
    parent = {"run": "r", "data": stream.fingerprints(), "reading": stream.state(4000)}
    on = stream.after([parent])
    whole, late = repetitions(stream, 8000, 1)[0], repetitions(on, 4000, 1)[0]
    assert late.epochs == pytest.approx(whole.epochs, rel=1e-3)
    assert late.last == pytest.approx(whole.last, rel=1e-3)
    first = repetitions(stream, 4000, 1)[0]
    both = first.average * first.tokens + late.average * late.tokens
    assert both == pytest.approx(whole.average * whole.tokens, rel=1e-3)


def test_past_forty_epochs_a_run_is_refused(tiny: Make) -> None:
    config = tiny(steps(41.5, tiny()))
    words = r"'up' would be read 41.*times \(it has \d+ tokens\), and past 40 .*allow_epochs: 42"
    for refused in (
        lambda: planned(config, 1),
        lambda: train(config, device=torch.device("cpu"), callbacks=[]),
    ):
        with pytest.raises(UserError, match=words):
            refused()
    assert not Path(config.run.folder, "metrics.jsonl").exists()
    allowed = tiny(steps(41.5, tiny()), "data.allow_epochs=42")
    assert planned(allowed, 1).facts["data"]["repetition"]["up"]["epochs"] > 40
    with pytest.raises(UserError, match=r"past 3 epochs data.allow_epochs stops it"):
        planned(tiny(steps(5, tiny()), "data.allow_epochs=3"), 1)


@pytest.mark.parametrize(
    ("epochs", "dropout", "rules"),
    [
        (0.5, 0.0, []),
        (0.5, 0.1, ["dropout_without_repeats"]),
        (3.0, 0.1, []),
        (5.0, 0.0, ["source_is_repeated", "repeats_without_dropout"]),
        (20.0, 0.1, ["source_is_repeated"]),
    ],
)
def test_advice(tiny: Make, epochs: float, dropout: float, rules: list[str]) -> None:
    config = tiny(steps(epochs, tiny()), f"model.dropout={dropout}")
    found = repetitions(open_sources(config), int(config.training.total_steps or 0) * 8, 1)
    said = dict(repetition_advice(config, found))
    assert list(said) == rules
    if epochs == 5.0:
        assert "worth 90% of a new one on average" in said["source_is_repeated"]
    if epochs == 20.0:
        assert "the next token is worth 29% of a new one" in said["source_is_repeated"]
    shown = planned(config, 1)
    assert shown.facts["data"]["advice"] == said
    assert ("repetition  " in shown.text) == (epochs > 1)


def test_a_launch_says_what_it_repeats(tiny: Make, tmp_path: Path) -> None:
    config = tiny(steps(5, tiny()))
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=1)
    said = events(Path(config.run.folder))
    (repeats,) = [one for one in said if one["event"] == "repetition"]
    assert repeats["sources"]["up"]["epochs"] == pytest.approx(5, rel=0.02)
    rules = [one["rule"] for one in said if one["event"] == "advice"]
    assert rules == ["source_is_repeated", "repeats_without_dropout"]
    fresh = tiny("training.total_steps=4", folder=tmp_path / "fresh")
    train(fresh, device=torch.device("cpu"), callbacks=[])
    assert not {"repetition", "advice"} & {one["event"] for one in events(tmp_path / "fresh")}


def watched(tmp_path: Path, course: list[tuple[float, float, float]]) -> list[dict[str, object]]:
    """Return the reports for a source with these (epochs, training, held-out losses) per step."""
    said: list[dict[str, object]] = []
    watch = RepetitionWatch(RunFolder(tmp_path), lambda kind, **more: said.append(more))  # type: ignore[arg-type]
    for step, (epochs, training, held_out) in enumerate(course, 1):
        watch.additions(SimpleNamespace(losses={"a": training}))  # type: ignore[arg-type]
        watch.on_row({"step": step, "epochs/a": epochs, "validation/a": held_out})
    return said


def test_the_alarm_names_the_checkpoint_before(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    course = [(1.5, 3.0, 3.0), (1.6, 2.9, 2.8), (1.7, 2.8, 2.7), (1.8, 2.7, 2.75)]
    course += [(1.9, 2.6, 2.8), (2.0, 2.5, 2.9), (2.1, 2.4, 3.0)]
    (said,) = watched(tmp_path, course)
    assert (said["step"], said["best_step"], said["checkpoint"]) == (6, 3, "step-2")
    assert (said["held_out_before"], said["held_out"]) == (2.7, 2.9)
    early = [(epochs - 1.0, *losses) for epochs, *losses in course]
    assert not watched(tmp_path, early)  # type: ignore[arg-type]
    rising = [(epochs, 3.0 + step, held) for step, (epochs, _, held) in enumerate(course)]
    assert not watched(tmp_path, rising)  # the training loss rises too
    assert not watched(tmp_path, [*course[:5], (2.0, 2.5, 2.7), *course[5:]])


def learnt(
    tiny: Make, folder: Path, documents: int, steps: int, sequences: int
) -> list[dict[str, Any]]:
    """Return the reports of a run on random text, which can only be memorized."""
    rng = np.random.default_rng(0)
    write_store(folder / "text", [rng.integers(1, 64, 32) for _ in range(documents)])
    write_store(folder / "held", [rng.integers(1, 64, 32) for _ in range(32)])
    every = steps // 10
    made = tiny(
        f"training.total_steps={steps}",
        f"batch.sequences={sequences}",
        f"batch.micro_batch_sequences={sequences}",
        "data.allow_epochs=60",
        f"evaluation.every_steps={every}",
        "evaluation.sequences_per_source=16",
        f"checkpoint={{every_steps: {2 * every}, keep_last: 20}}",
        "schedule={kind: constant, warmup_steps: 3}",
    )
    plain = json.loads(made.model_dump_json())
    source = {"name": "text", "train": str(folder / "text"), "validation": str(folder / "held")}
    plain["data"]["sources"] = [source]
    plain["run"]["folder"] = str(folder / "run")
    train(RunConfig.model_validate(plain), device=torch.device("cpu"), callbacks=[])
    return [one for one in events(folder / "run") if one["event"] == "overfits"]


def before(step: int, every: int) -> str | None:
    """Return the checkpoint at or before a step."""
    return f"step-{step // every * every}" if step >= every else None


def test_what_is_read_fifty_times_is_learnt_by_heart(tiny: Make, tmp_path: Path) -> None:
    """512 tokens; as many steps of new text give no report."""
    for name in ("few", "many"):
        (tmp_path / name).mkdir()
    said = learnt(tiny, tmp_path / "few", documents=16, steps=100, sequences=8)
    assert rows(tmp_path / "few" / "run")[-1]["epochs/text"] == 50
    assert said[0]["best_step"] < said[0]["step"] <= 100
    assert said[0]["checkpoint"] == before(said[0]["best_step"], 20)
    assert not learnt(tiny, tmp_path / "many", documents=800, steps=100, sequences=8)


@pytest.mark.slow
def test_sixty_four_kib_read_fifty_times_are_learnt_by_heart(tiny: Make, tmp_path: Path) -> None:
    """32768 tokens of two bytes."""
    said = learnt(tiny, tmp_path, documents=1024, steps=800, sequences=64)
    assert (tmp_path / "text.bin").stat().st_size == 64 * 1024
    assert rows(tmp_path / "run")[-1]["epochs/text"] == 50
    assert said
    assert said[0]["checkpoint"] == before(said[0]["best_step"], 160)
