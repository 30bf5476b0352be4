"""Runs on full documents: the same losses on any number of ranks, resumes, the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allometry.configs.run import RunConfig
from run_folders import events, rows
from test_dist_runs import launch, losses

Ranks = Callable[..., list[Any]]
Make = Callable[..., RunConfig]
DOCUMENTS = (
    "data.kind=documents",
    "data.max_document_tokens=56",
    "batch.micro_batch_sequences=1",
    "parallel.context.min_chunk_tokens=4",
)


def capacity(tokens: int) -> str:
    return f"parallel.context.capacity_tokens={tokens}"


SHARDED = {
    "hdp2": (2, ()),
    "hdp3-zero1": (3, ("parallel.zero.stage=1",)),
    "hdp2-zero3": (2, ("parallel.zero.stage=3",)),
    "pp2-hdp2": (4, ("parallel.pp=2", "parallel.context.policy=pipeline_balanced")),
    "hdp2-tp2": (4, ("parallel.tp=2",)),
}


@pytest.mark.parametrize(
    "name",
    ["hdp2", "pp2-hdp2"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("hdp3-zero1", "hdp2-zero3", "hdp2-tp2")
    ],
)
def test_two_resumes_are_bit_exact_and_the_losses_those_of_one_process(
    tiny: Make, run_ranks: Ranks, tmp_path: Path, name: str
) -> None:
    ranks, more = SHARDED[name]
    settings = (*DOCUMENTS, capacity(40), *more)
    straight = tiny(*settings, folder=tmp_path / "straight")
    run_ranks(launch, ranks, straight)
    parts = tiny(*settings, folder=tmp_path / "parts")
    for stop in (7, 12, None):
        run_ranks(launch, ranks, parts, stop)
    assert losses(parts) == losses(straight)
    assert len(losses(parts)) == 20
    one = tiny(*DOCUMENTS, capacity(64), folder=tmp_path / "one")
    run_ranks(launch, 1, one)
    assert losses(straight) == pytest.approx(losses(one), rel=1e-5)
    for row, alone in zip(rows(tmp_path / "straight"), rows(tmp_path / "one"), strict=True):
        for key in ("tokens", "flops", "tokens/up", "tokens/down"):
            assert row[key] == alone[key]
        for key in {"validation/up", "validation/down"} & alone.keys():
            assert row[key] == pytest.approx(alone[key], rel=1e-5)
        assert row["hdp/bytes_sent"] > 0 == alone["hdp/bytes_sent"]
    assert "validation/up" in rows(tmp_path / "one")[-1]


def test_a_run_on_documents_moves_between_layouts(
    tiny: Make, run_ranks: Ranks, tmp_path: Path
) -> None:
    straight = tiny(*DOCUMENTS, capacity(64), folder=tmp_path / "straight")
    run_ranks(launch, 1, straight)
    moving = tmp_path / "moving"
    static = ("parallel.context.policy=static", "parallel.context.degree=2")
    run_ranks(launch, 4, tiny(*DOCUMENTS, capacity(20), folder=moving), 5)
    run_ranks(launch, 2, tiny(*DOCUMENTS, capacity(32), *static, folder=moving), 9)
    run_ranks(launch, 2, tiny(*DOCUMENTS, capacity(64), "parallel.pp=2", folder=moving), 13)
    run_ranks(launch, 3, tiny(*DOCUMENTS, capacity(32), "parallel.zero.stage=2", folder=moving))
    found = losses(tiny(folder=moving))
    assert found == pytest.approx(losses(straight), rel=1e-5)
    assert found[:5] != pytest.approx(losses(straight)[1:6], rel=1e-5), "the comparison can fail"


def test_the_record_has_the_plan_of_each_step(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    config = tiny(*DOCUMENTS, capacity(40), folder=tmp_path / "run")
    run_ranks(launch, 2, config)
    lines = (tmp_path / "run" / "plans.jsonl").read_text().splitlines()
    plans = [json.loads(line) for line in lines]
    found = rows(tmp_path / "run")
    assert [plan["step"] for plan in plans] == [row["step"] for row in found]
    before = 0
    for plan, row in zip(plans, found, strict=True):
        tokens = sum(unit[1] for unit in plan["units"])
        assert tokens == row["tokens"] - before
        before = row["tokens"]
        documents = sum(unit[0] for unit in plan["units"])
        degrees = {key: n for key, n in row.items() if key.startswith("hdp/degree/")}
        assert sum(degrees.values()) == documents
        assert row["hdp/waves"] == max(map(len, plan["orders"]))
        assert row["hdp/balance"] >= 1.0


def test_idle_ranks_are_told(tiny: Make, run_ranks: Ranks, tmp_path: Path) -> None:
    few = tiny(
        *DOCUMENTS,
        capacity(40),
        "parallel.context.min_chunk_tokens=64",
        "batch.sequences=2",
        "training.total_steps=4",
        folder=tmp_path / "few",
    )
    run_ranks(launch, 4, few)
    enough = tiny(*DOCUMENTS, capacity(40), "training.total_steps=4", folder=tmp_path / "enough")
    run_ranks(launch, 2, enough)
    told = {
        name: [event for event in events(tmp_path / name) if event["event"] == "idle_ranks"]
        for name in ("few", "enough")
    }
    (event,) = told["few"]
    assert 1 <= event["ranks"] <= 3
    assert told["enough"] == []


@pytest.mark.slow
def test_the_standard_library_on_one_two_and_four_ranks(run_ranks: Ranks, tmp_path: Path) -> None:
    """Train 200 steps on complete files of tens to tens of thousands of tokens."""
    from allometry.data.prepare import PrepareRequest, prepare
    from allometry.data.store import TokenStore

    store = tmp_path / "store"
    prepare(
        PrepareRequest(inputs=("builtin:python-code",), out=str(store), vocab_size=1024), quiet=True
    )
    lengths = TokenStore(str(store / "python-code.train")).lengths
    assert np.percentile(lengths, 5) < 100 < 10_000 < lengths.max()
    curves = {}
    for ranks, held in ((1, 16384), (2, 8192), (4, 4096)):
        config = RunConfig.model_validate(
            {
                "run": {"folder": str(tmp_path / f"hdp{ranks}")},
                "model": {
                    "kind": "dense",
                    "vocab_size": 1024,
                    "width": 32,
                    "num_layers": 2,
                    "num_heads": 2,
                    "num_kv_heads": 1,
                    "ffn_width": 64,
                },
                "data": {
                    "kind": "documents",
                    "sequence_length": 2048,
                    "max_document_tokens": 16384,
                    "sources": [{"name": "code", "train": str(store / "python-code.train")}],
                },
                "batch": {"sequences": 8, "micro_batch_sequences": 1},
                "training": {"total_steps": 200, "compute_dtype": "fp32"},
                "optimizer": {"lr": 3e-3},
                "schedule": {"kind": "wsd", "warmup_steps": 20},
                "parallel": {"context": {"capacity_tokens": held}, "timeout_s": 600},
                "record": {"tensorboard": False, "display_every_steps": 100},
            }
        )
        run_ranks(launch, ranks, config, timeout_s=3600.0)
        found = rows(Path(config.run.folder))
        curves[ranks] = np.array([row["loss"] for row in found])
        if ranks > 1:
            assert any(f"hdp/degree/{ranks}" in row for row in found)
    assert len(curves[1]) == 200
    assert curves[1][-20:].mean() < curves[1][0] - 2.0
    differences = {ranks: float(np.abs(curves[ranks] - curves[1]).max()) for ranks in (2, 4)}
    print(f"\nlargest difference of a loss from one rank's: {differences}")
    assert max(differences.values()) < 1e-4
