"""FLOPs and rates in the record, against a count document by document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allometry.configs.run import RunConfig
from allometry.data.stream import Stream
from allometry.data.synthetic import write_store
from allometry.launch.runs.dry_run import data_here
from allometry.scaling.batch import BatchPlan
from allometry.scaling.count import flops_per_token
from allometry.scaling.plan import RunPlan
from allometry.trainer.train import train
from run_folders import rows

Make = Callable[..., RunConfig]
RAMP = (
    "batch.ramp={start_sequences: 4, increment_sequences: 2, over_tokens: 1000}",
    "training.total_steps=12",
    "evaluation.every_steps=null",
)


def run(config: RunConfig) -> list[dict[str, Any]]:
    train(config, device=torch.device("cpu"), callbacks=[])
    return rows(Path(config.run.folder))


def counted(config: RunConfig, step: int) -> int:
    """Return a step's FLOPs, counted document by document."""
    plan = BatchPlan(config.batch, config.data.sequence_length)
    assert config.data.kind == "sequences"
    stream = Stream(config.data, config.run.seed)
    batch = stream.batch(plan.sequences_before(step), plan.sequences(step))
    length = config.data.sequence_length
    lengths = (
        [length] * batch.num_sequences
        if batch.documents is None
        else batch.documents.lengths.tolist()
    )
    return sum(n * flops_per_token(config.model, n).total for n in lengths)


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_a_row_counts_the_documents_of_its_own_step(tiny: Make, packing: str) -> None:
    config = tiny(*RAMP, f"data.packing={packing}")
    found = run(config)
    steps = np.diff([0, *(row["flops"] for row in found)]).tolist()
    assert steps == [counted(config, row["step"]) for row in found]
    tokens = np.diff([0, *(row["tokens"] for row in found)]).tolist()
    assert len(set(tokens)) == 3, "the ramp changes the batch"
    whole = flops_per_token(config.model, config.data.sequence_length).total
    as_sequences = [whole * each for each in tokens]
    assert (steps == as_sequences) == (packing == "concatenated")
    folder = Path(config.run.folder)
    peak = json.loads((folder / "run.json").read_text())["peak"]["flops_per_s"]
    for row, flops, each in zip(found, steps, tokens, strict=True):
        assert row["mfu"] * peak * row["time_s"] == pytest.approx(flops, rel=1e-12)
        assert row["tokens_per_s"] * row["time_s"] == pytest.approx(each, rel=1e-12)


def test_the_same_documents_count_the_same_as_sequences_and_as_documents(
    tiny: Make, tmp_path: Path
) -> None:
    """A window as long as an epoch contains every document once, uncut."""
    lengths = [[2, 31, 7, 20, 4], [3, 3, 40, 18]]  # 64 tokens both
    for name, each in zip("ab", lengths, strict=True):
        write_store(tmp_path / name, [np.arange(n) % 63 + 1 for n in each])
    common = (
        "data.sequence_length=64",
        f"data.sources=[{{name: a, train: {tmp_path}/a}}, {{name: b, train: {tmp_path}/b}}]",
        "batch={sequences: 2, micro_batch_sequences: 1}",
        "training.total_steps=3",
        "schedule.warmup_steps=1",
    )
    packed = run(tiny(*common, folder=tmp_path / "sequences"))
    kind = ("data.kind=documents", "data.max_document_tokens=64")
    config = tiny(*common, *kind, folder=tmp_path / "documents")
    whole = run(config)
    assert [row["flops"] for row in packed] == [row["flops"] for row in whole]
    one_step = sum(n * flops_per_token(config.model, n).total for each in lengths for n in each)
    assert [row["flops"] for row in whole] == [one_step, 2 * one_step, 3 * one_step]


@pytest.mark.parametrize("kind", ["sequences", "documents"])
def test_a_dry_run_expects_the_flops_that_a_run_counts(tiny: Make, kind: str) -> None:
    of_documents = (
        "data.kind=documents",
        "data.max_document_tokens=32",
        "batch.micro_batch_sequences=1",
    )
    config = tiny("evaluation.every_steps=null", *(of_documents if kind == "documents" else ()))
    plan = RunPlan.of(config, 1)
    counted = run(config)[-1]["flops"]
    assert data_here(config, plan)["total_flops"] == pytest.approx(counted, rel=0.005)
    assert plan.total_flops > 1.01 * counted
