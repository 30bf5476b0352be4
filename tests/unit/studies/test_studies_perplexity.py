"""Losses of documents under a run: each document alone, and the documents with low loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allometry.configs.data import Select
from allometry.configs.run import RunConfig
from allometry.data.select.kept import select_documents
from allometry.data.select.scores import read_scores
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store
from allometry.studies.perplexity import Scorer, document_losses, open_scorer
from allometry.trainer.train import train
from shell import Shell

Make = Callable[..., RunConfig]


@pytest.fixture
def run(tiny: Make) -> Path:
    """Return a run that has learned to count up, and never down."""
    config = tiny("data.sources.1.weight=0", "training.total_steps=30", "checkpoint.every_steps=30")
    train(config, device=torch.device("cpu"), callbacks=[])
    return Path(config.run.folder)


@torch.no_grad()
def alone(scorer: Scorer, tokens: list[int]) -> float:
    """Return the mean loss of a document, piece by piece without packing, from the logits."""
    losses = []
    for start in range(0, len(tokens) - 1, scorer.window):
        inputs = tokens[start : start + scorer.window]
        logits = scorer.model(torch.tensor([inputs]))[0].double()
        targets = tokens[start + 1 : start + scorer.window + 1]
        log = torch.log_softmax(logits, -1)
        losses += [-float(log[place, target]) for place, target in enumerate(targets)]
    return sum(losses) / len(losses)


def test_scores_are_the_losses_of_documents_alone(
    run: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    lengths = [2, 0, 1, 31, 32, 33, 34, 64, 65, 100, 7]
    write_store(tmp_path / "odd", [rng.integers(1, 64, length) for length in lengths])
    store, scorer = TokenStore(tmp_path / "odd"), open_scorer(run, None, torch.device("cpu"))
    assert scorer.window == 32
    for at_once in (1, 96, 8192):
        values, _ = document_losses(scorer, store, at_once)
        for document, length in enumerate(lengths):
            if length < 2:
                assert np.isnan(values[document])
                continue
            expected = alone(scorer, store.read(document).astype(int).tolist())
            assert values[document] == pytest.approx(expected, rel=1e-5)
    command(run, tiny_store, tmp_path, Shell(capsys))


def command(run: Path, tiny_store: Path, tmp_path: Path, shell: Shell) -> None:
    """Of documents that count up and down, half each, those that count up have a lower loss."""
    up, down = (TokenStore(tiny_store / f"{name}.train") for name in ("up", "down"))
    both = [store.read(document) for document in range(60) for store in (up, down)]
    write_store(tmp_path / "both", both)
    asked = ("select", "perplexity", tmp_path / "both", "--model", run)
    facts = shell.json(*asked, "--keep", 0.5, "--side", "bottom")
    values = read_scores(facts["scores"], TokenStore(tmp_path / "both")).values
    assert np.median(values[0::2]) < np.median(values[1::2]) - 0.5
    kept = facts["select"]["samples"]["kept"]
    assert sum(one["document"] % 2 == 0 for one in kept) >= 3
    assert facts["settings"]["runs"][0]["step"] == 30
    assert facts["settings"]["scored_by_their_own_run"] == 0
    record = json.loads((tmp_path / "both.perplexity.scores.json").read_text())
    assert record["seconds"] > 0
    assert "torch" in record["versions"]
    again = shell.json("select", "perplexity", tiny_store / "up.train", "--model", run)
    assert again["settings"]["scored_by_their_own_run"] == up.num_documents
    assert "give two runs, each trained on another half" in again["warnings"][0]
    write_store(tmp_path / "wide", [[1, 2, 200]])
    for arguments, words in (
        ((tmp_path / "wide", "--model", run), "model.vocab_size=64 is too small"),
        ((tmp_path / "both", "--model", tmp_path), "has no config.yaml"),
        ((tmp_path / "both", "--model", run, "--step", 7), "has no checkpoint step-7"),
        ((tmp_path / "both", "--model", run, "--dtype", "fp8"), "--dtype=fp8 is not known"),
        ((tmp_path / "both", "--model", run, "--keep", 0.5), "--keep and --side belong together"),
    ):
        assert words in shell.refusal("select", "perplexity", *arguments)


def test_two_runs_score_what_the_other_has_read(
    tiny: Make, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = Shell(capsys)
    prefix = tiny_store / "down.train"
    halves = shell.json("select", "random", prefix, "--seed", 4, "--name", "halves")["scores"]
    runs, kept = [], []
    store = TokenStore(prefix)
    for side in ("top", "bottom"):
        select = {"scores": halves, "keep": 0.5, "side": side}
        config = tiny(
            "training.total_steps=4",
            f"data.sources.1.select={json.dumps(select)}",
            folder=tmp_path / side,
        )
        train(config, device=torch.device("cpu"), callbacks=[])
        runs.append(tmp_path / side)
        chosen = np.zeros(store.num_documents, np.bool_)
        chosen[select_documents(store, Select(**select), "down").documents] = True
        kept.append(chosen)
    values, counts = shell_scores(shell, prefix, runs), kept[0].astype(int) + kept[1]
    assert set(counts) <= {1, 2}
    assert (counts == 2).sum() <= 1  # the document at the boundary of the halves
    scorers = [open_scorer(run, None, torch.device("cpu")) for run in runs]
    whole = [document_losses(scorer, store)[0] for scorer in scorers]
    np.testing.assert_allclose(values[~kept[0]], whole[0][~kept[0]], rtol=1e-5)
    np.testing.assert_allclose(values[~kept[1]], whole[1][~kept[1]], rtol=1e-5)
    assert np.isnan(values[counts == 2]).all()
    shell("select", "random", prefix, "--seed", 5, "--name", "halves")
    said = shell.refusal("select", "perplexity", prefix, "--model", runs[0], "--model", runs[1])
    assert "was trained on documents chosen by other scores" in said


def shell_scores(shell: Shell, prefix: Path, runs: list[Path]) -> np.ndarray:
    asked = ("--model", runs[0], "--model", runs[1], "--name", "strangers")
    facts = shell.json("select", "perplexity", prefix, *asked)
    assert [one["step"] for one in facts["settings"]["runs"]] == [4, 4]
    assert not facts["warnings"]
    return read_scores(facts["scores"], TokenStore(prefix)).values
