"""Scores of the lm-evaluation-harness equal those of the run's own model."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.interop import harness
from allometry.interop.huggingface.convert import export_hf
from allometry.laws.scores import read_scores
from allometry.trainer.train import train
from scored import TASKS, documents, log_likelihoods, write_tokenizer
from shell import Shell

pytestmark = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="the lm-evaluation-harness is not installed"
)


@pytest.fixture
def run(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    """Return a run that has partly learned to count."""
    config = tiny(
        f"data.tokenizer={write_tokenizer(tmp_path)}",
        "training.total_steps=60",
        "checkpoint={every_steps: 20, keep_last: 3}",
        "evaluation.every_steps=20",
    )
    train(config, device=torch.device("cpu"), callbacks=[])
    return Path(config.run.folder)


def test_scores_are_our_own_likelihoods(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shell = Shell(capsys)
    said = ["evaluate", run, "--tasks", f"{TASKS}/counting_choice.yaml,{TASKS}/counting_words.yaml"]
    options = ["--checkpoints", "20,60", "--end-of-document", "w0", "--json"]
    shell(*said, *options)
    rows = read_scores(run)
    found = {(row["step"], row["task"], row["metric"]): row for row in rows}
    assert len(found) == len(rows) == 8
    asked = documents()
    for step in (20, 60):
        logs = log_likelihoods(run, step)
        right = [max(range(len(one)), key=one.__getitem__) for one in logs]
        answers = [one["answer"] for one in asked]
        correct = [mine == answer for mine, answer in zip(right, answers, strict=True)]
        choice = found[step, "counting_choice", "acc"]
        assert choice["value"] == choice["accuracy"] == sum(correct) / len(asked)
        assert choice["chance"] == pytest.approx(
            sum(1 / len(one["choices"]) for one in asked) / len(asked)
        )
        words = [one[answer] for one, answer in zip(logs, answers, strict=True)]
        perplexity = math.exp(-sum(words) / len(words))
        row = found[step, "counting_words", "perplexity"]
        assert row["value"] == pytest.approx(perplexity, rel=1e-5)
        assert row["chance"] is None
        assert "accuracy" not in row
        assert {row["n"] for row in rows} == {24}
        assert row["tokens"] == step * 8 * 32
        assert row["loss"] > 0
    assert (
        found[60, "counting_choice", "acc"]["value"]
        > 0.7
        > found[60, "counting_choice", "acc"]["chance"]
    )
    assert (
        found[20, "counting_words", "perplexity"]["value"]
        > found[60, "counting_words", "perplexity"]["value"]
    )

    # Evaluated tasks are not repeated; the same files in another folder are the same task.
    moved = shutil.copytree(TASKS, tmp_path / "moved")
    before = (run / "scores.jsonl").read_bytes()
    shell("evaluate", run, "--tasks", moved, *options)
    assert (run / "scores.jsonl").read_bytes() == before


def test_a_group_has_a_score_of_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over the documents of both tasks, with one request per document."""
    from lm_eval.api.group import Group

    load = harness._load

    def grouped(tasks: Sequence[str]) -> tuple[Any, Any]:
        manager, loaded = load(tasks)
        metrics = [{"metric": "acc", "weight_by_size": True}]
        both = Group.from_config({"group": "both", "aggregate_metric_list": metrics})
        for task in loaded["tasks"].values():
            both.add(task)
        return manager, loaded | {"groups": {"both": both}}

    monkeypatch.setattr(harness, "_load", grouped)
    export_hf(run, tmp_path / "model", end_of_document="w0")
    asked = harness.Harness([str(TASKS)])
    found = asked.scores(tmp_path / "model", device="cpu", dtype="float32", batch_size=8)
    by_task = {one.task: one for one in found if one.metric == "acc"}
    both = by_task.pop("both")
    assert both.value == pytest.approx(sum(one.value for one in by_task.values()) / 2)
    assert (both.n, both.chance) == (48, None)
    assert both.task_hash not in [one.task_hash for one in by_task.values()]
    assert asked.hashes["both"] == both.task_hash


def test_what_cannot_be_evaluated_is_a_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(capsys)
    task = TASKS / "counting_choice.yaml"
    assert "give it with --end-of-document" in shell.refusal("evaluate", run, "--tasks", task)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    assert "cannot be read" in shell.refusal("evaluate", run, "--tasks", broken)
    broken.write_text("dataset_path: json\n")
    assert "describes no task" in shell.refusal("evaluate", run, "--tasks", broken)
    gone = task.read_text().replace("counting.jsonl", "absent.jsonl")
    broken.write_text(gone)
    assert "the tasks cannot be loaded" in shell.refusal("evaluate", run, "--tasks", broken)
    (tmp_path / "empty").mkdir()
    assert "holds no .yaml" in shell.refusal("evaluate", run, "--tasks", tmp_path / "empty")
    assert not (run / "scores.jsonl").exists()

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match="fetch them over the network") as refused:
        harness.Harness([str(task)])
    assert "\n" not in json.dumps(str(refused.value))
