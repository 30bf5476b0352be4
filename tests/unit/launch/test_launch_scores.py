"""scores.jsonl: written by ``allometry evaluate``, read by laws and reports."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.interop.harness import Score
from allometry.launch.report.scores import scores
from allometry.launch.runs import evaluate
from allometry.laws.scores import read_scores, with_rows
from allometry.trainer.train import train
from fake_runs import fake_run
from report_sections import inputs, panels
from scored import write_tokenizer
from shell import Shell


class FakeHarness:
    """Return given answers, and record the evaluated models."""

    version = "lm_eval 0"
    asked: Sequence[str] = ()

    def __init__(self, tasks: Sequence[str], **_: Any) -> None:
        self.hashes = dict.fromkeys(tasks, "of the documents")

    def scores(self, folder: Path, **_: Any) -> list[Score]:
        assert (folder / "config.json").is_file()
        FakeHarness.asked = [*FakeHarness.asked, str(folder)]
        shared = {"filter": "none", "stderr": 0.01, "n": 10, "chance": 0.5, "fewshot": 0}
        more = {"higher_is_better": True, "task_version": None, "task_hash": "of the documents"}
        return [Score(task=t, metric="acc", value=0.75, **shared, **more) for t in self.hashes]


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setattr(evaluate, "Harness", FakeHarness)
    monkeypatch.setattr(evaluate, "require_harness", lambda: FakeHarness.version)
    monkeypatch.setattr(FakeHarness, "asked", ())
    return Shell(capsys)


@pytest.fixture(scope="module")
def trained(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    described = {
        "run": {"folder": str(folder / "run")},
        "model": {
            "kind": "dense",
            "vocab_size": 64,
            "width": 16,
            "num_layers": 1,
            "num_heads": 2,
            "ffn_width": 32,
        },
        "data": {
            "sequence_length": 32,
            "tokenizer": str(write_tokenizer(folder)),
            "sources": [
                {
                    "name": n,
                    "train": f"{tiny_store}/{n}.train",
                    "validation": f"{tiny_store}/{n}.validation",
                }
                for n in ("up", "down")
            ],
        },
        "batch": {"sequences": 8, "micro_batch_sequences": 8},
        "training": {"total_steps": 20, "compute_dtype": "fp32"},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "constant", "warmup_steps": 3},
        "checkpoint": {"every_steps": 5, "keep_last": 2},
        "evaluation": {"every_steps": 10, "sequences_per_source": 4},
        "record": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(json.dumps(described))
    train(load(folder / "run.yaml"), device=torch.device("cpu"), callbacks=[])
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_each_checkpoint_once(shell: Shell, run: Path) -> None:
    words = ("evaluate", run, "--tasks", "a,b", "--end-of-document", "w0")
    with open(run / "scores.jsonl", "w") as file:
        file.write('{"task": "torn"')  # by a killed launch
    said = shell.json(*words, "--checkpoints", "all")["scores"]
    assert [(row["step"], row["task"]) for row in said] == [
        (15, "a"), (15, "b"), (20, "a"), (20, "b"),
    ]  # fmt: skip
    assert said == read_scores(run)
    assert [row["loss"] is None for row in said] == [True, True, False, False], "held out at 20"
    assert said[2]["tokens"] == 20 * 8 * 32
    assert (said[2]["accuracy"], said[2]["error"], said[2]["harness"]) == (0.75, 0.25, "lm_eval 0")
    assert said[0]["checkpoint"] != said[2]["checkpoint"]
    assert len(FakeHarness.asked) == 2
    assert not [path for path in FakeHarness.asked if Path(path).exists()], "exports are removed"

    before = (run / "scores.jsonl").read_bytes()
    assert shell.json(*words)["scores"] == said[2:]
    assert (run / "scores.jsonl").read_bytes() == before
    shell(*words, "--again", "--checkpoints", "20")
    assert len(FakeHarness.asked) == 3
    assert len(read_scores(run)) == 4, "of equal rows the last"
    shell(*words, "--limit", "5")
    assert len(read_scores(run)) == 6, "another question"


def test_a_model_of_others(shell: Shell, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    shell("convert", run, "--out", out, "--end-of-document", "w0")
    (row,) = shell.json("evaluate", out, "--tasks", "a")["scores"]
    assert (row["run"], row["step"], row["tokens"]) == ("model", 20, 5120)
    assert read_scores(out) == [row]
    assert "goes with a run" in shell.refusal(
        "evaluate", out, "--tasks", "a", "--checkpoints", "all"
    )


REFUSED = (
    (("--tasks", "a"), "give it with --end-of-document"),
    (("--tasks", ","), "--tasks names none"),
    (("--tasks", "a", "--checkpoints", "10"), "has no checkpoint 10; use all, last or of 15, 20"),
    (("--tasks", "a", "--checkpoints", "5,x"), "has no checkpoint 5"),
    (("--tasks", "a", "--dtype", "fp8"), "--dtype=fp8 is not known"),
)


def test_refusals(shell: Shell, run: Path, tmp_path: Path) -> None:
    for words, sentence in REFUSED:
        assert sentence in shell.refusal("evaluate", run, *words)
    assert "holds neither" in shell.refusal("evaluate", tmp_path, "--tasks", "a")
    fake_run(tmp_path / "other")
    assert "has no checkpoint yet" in shell.refusal("evaluate", tmp_path / "other", "--tasks", "a")
    assert not (run / "scores.jsonl").exists()


def test_a_missing_package_is_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name)
    )
    assert Shell(capsys).refusal("evaluate", tmp_path, "--tasks", "a") == (
        "allometry: evaluate needs lm_eval, which is not installed; pip install "
        "'allometry[evaluate]'"
    )


def rows_of(run: str, tokens: Sequence[int], values: Sequence[float], **more: Any) -> str:
    shared = {"task": "quiz", "metric": "acc", "filter": "none", "stderr": 0.02, "chance": 0.25}
    return with_rows(
        "",
        (
            shared
            | {"run": run, "step": count // 256, "tokens": count, "value": value}
            | {"accuracy": value, "error": 1 - value}
            | more
            for count, value in zip(tokens, values, strict=True)
        ),
    )


def test_laws_of_scores_read_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    losses = np.linspace(2.0, 5.0, 12)
    lines = "".join(
        rows_of("a", [256 * place], [1 - (0.75 - 8.0 * math.exp(-1.5 * loss))], loss=loss)
        for place, loss in enumerate(losses, 1)
    )
    unknown = rows_of("a", [256], [0.5], loss=None)
    (tmp_path / "scores.jsonl").write_text(lines + unknown)
    fitted = Shell(capsys).json(
        *("fit", "downstream_error", tmp_path / "scores.jsonl", "--bootstraps", 0),
        *("--where", "metric == 'acc'", "--where", "loss > 0"),
    )
    found = {name: one["value"] for name, one in fitted["parameters"].items()}
    assert found["epsilon"] == pytest.approx(0.75, rel=1e-3)
    assert found["gamma"] == pytest.approx(1.5, rel=1e-2)


def test_a_report_shows_scores_and_what_was_forgotten(tmp_path: Path) -> None:
    fake_run(tmp_path / "trunk")
    fake_run(tmp_path / "branch")
    record = json.loads((tmp_path / "branch" / "run.json").read_text())
    record["parent"] = {"folder": str(tmp_path / "trunk"), "step": 20}
    (tmp_path / "branch" / "run.json").write_text(json.dumps(record))
    (tmp_path / "trunk" / "scores.jsonl").write_text(
        rows_of("trunk", [2560, 5120, 10240], [0.25, 0.5, 0.6])
    )
    (tmp_path / "branch" / "scores.jsonl").write_text(
        rows_of("branch", [2560, 5120, 10240], [0.25, 0.5, 0.4])
    )
    section = scores(inputs(tmp_path / "trunk", tmp_path / "branch"))
    found = panels(section)
    quiz = found["quiz, acc"]
    kinds = ["band", "joined", "band", "dotted", "joined", "dashed"]
    assert [one.style for one in quiz.series] == kinds, "what the branch took over is dotted"
    assert list(quiz.series[-1].y) == [0.25, 0.25]
    trunk, branch = found["scores since the stage began"].series
    assert list(trunk.y) == pytest.approx([0.0, 0.25, 0.35])
    assert list(branch.x) == [5120, 10240], "its own stage, from where it branched"
    assert list(branch.y) == pytest.approx([0.0, -0.1])
    lost = found["held-out losses since the stage began"].series
    assert {one.name for one in lost} == {
        f"{r}, {s}" for r in ("trunk", "branch") for s in ("web", "code")
    }
    assert all(one.y[0] == 0.0 for one in lost)
    assert scores(inputs(tmp_path / "trunk")).absent is None
    (tmp_path / "trunk" / "scores.jsonl").unlink()
    assert scores(inputs(tmp_path / "trunk")).absent is not None


def test_scores_go_with_the_steps_they_are_of(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """A branch includes its trunk's scores up to the branch; a run that goes
    back drops later ones."""
    config = tiny("schedule={kind: constant, warmup_steps: 3}", folder=tmp_path / "trunk")
    train(config, device=torch.device("cpu"), callbacks=[])
    (tmp_path / "trunk" / "scores.jsonl").write_text(
        "".join(rows_of("trunk", [256 * step], [0.5]) for step in (5, 15, 20))
    )
    branch = tiny(
        "schedule={kind: constant, warmup_steps: 3}",
        f"run.parent={{folder: {tmp_path}/trunk, step: 15}}",
        folder=tmp_path / "branch",
    )
    train(branch, device=torch.device("cpu"), callbacks=[], stop_at_step=16)
    assert [row["step"] for row in read_scores(tmp_path / "branch")] == [5, 15]
