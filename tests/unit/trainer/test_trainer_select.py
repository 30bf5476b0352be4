"""Runs over selected documents: resumed bitwise, and refused with other scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.data.select.scores import scores_path, write_scores
from allometry.data.store import TokenStore
from allometry.launch.report.selection import selection
from allometry.launch.runs.dry_run import planned
from allometry.trainer.train import train
from report_sections import inputs
from run_folders import rows

Make = Callable[..., RunConfig]
FEW = ("training.total_steps=6", "checkpoint.every_steps=2", "schedule={kind: constant}")


def write(store: Path, seed: int, scorer: str = "luck") -> Path:
    """Write random scores drawn with ``seed``."""
    opened = TokenStore(store / "up.train")
    values = np.random.default_rng(seed).normal(size=opened.num_documents)
    return write_scores(opened, scorer, values, {"seed": seed}).path


def select(store: Path, keep: float = 0.25, side: str = "top") -> str:
    scores = scores_path(store / "up.train", "luck")
    return f"data.sources.0.select={{scores: {scores}, keep: {keep}, side: {side}}}"


def run(config: RunConfig, stop: int | None = None) -> Path:
    train(config, device=torch.device("cpu"), callbacks=[], stop_at_step=stop)
    return Path(config.run.folder)


def test_a_run_of_chosen_documents(tiny: Make, tiny_store: Path, tmp_path: Path) -> None:
    """Uninterrupted, and stopped and resumed: the same bits, counted in kept tokens."""
    write(tiny_store, 0)
    whole = run(tiny(*FEW, select(tiny_store), folder=tmp_path / "whole"))
    parted = tmp_path / "parted"
    foreseen = planned(tiny(*FEW, select(tiny_store), folder=parted), 1)
    run(tiny(*FEW, select(tiny_store), folder=parted), stop=3)
    run(tiny(*FEW, select(tiny_store), folder=parted))
    timed = {"time_s", "tokens_per_s", "mfu", "peak_bytes"}
    for one, other in zip(rows(whole), rows(parted), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    source = json.loads((whole / "run.json").read_text())["data"]["sources"]["up"]
    kept, total = source["select"]["kept_tokens"], source["select"]["tokens"]
    assert kept / total == pytest.approx(0.25, abs=0.01)
    last = rows(whole)[-1]
    assert last["epochs/up"] == last["tokens/up"] / kept
    assert foreseen.facts["data"]["select"]["up"] == source["select"]
    assert f"up: {kept:,} of {total:,} tokens, the top by luck" in foreseen.text
    plain = run(tiny(*FEW, folder=tmp_path / "plain"))
    assert rows(plain)[-1]["loss"] != last["loss"]
    assert rows(plain)[-1]["validation/down"] > 0

    refuse_changes(tiny, tiny_store, parted)
    said = selection(inputs(whole, plain))
    chosen, samples = said.tables
    assert chosen.rows[0][1:5] == ("up", "luck", "0.25", "top")
    assert chosen.rows[0][-1] == "seed 0"
    assert [row[2] for row in samples.rows] == ["kept"] * 4 + ["dropped"] * 4
    assert "no tokenizer" in said.notes[0]
    assert selection(inputs(plain)).absent


def refuse_changes(tiny: Make, store: Path, folder: Path) -> None:
    """Another share, another side, no selection, and another file under the same name."""
    words = "sources up: select keeps other documents than those this run was started with"
    more = "training.total_steps=8"
    for other in ((select(store, keep=0.3),), (select(store, side="middle"),), ()):
        with pytest.raises(UserError, match=words):
            run(tiny(*FEW, more, *other, folder=folder))
    write(store, 1)
    with pytest.raises(UserError, match=words):
        run(tiny(*FEW, more, select(store), folder=folder))
    write(store, 0)
    run(tiny(*FEW, more, select(store), folder=folder), stop=7)
    assert len(rows(folder)) == 7
