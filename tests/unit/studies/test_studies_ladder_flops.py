"""Compute budgets of a ladder against the tokens that its runs read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.run import RunConfig
from allometry.data.stream import Stream, open_stream
from allometry.scaling.count import document_flops, flops_per_token
from planned_ladders import per_token, planned


@pytest.fixture
def base(tiny: Callable[..., RunConfig], tmp_path: Path) -> Path:
    tiny()
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize("packing", ["per_document", "concatenated"])
def test_a_compute_budget_is_what_a_run_records(base: Path, packing: str) -> None:
    budget = 4e9
    keys = {"data.packing": packing, "data.sequence_length": 128}
    plan = planned(base, set=keys, tokens=None, isoflop={"flops": [budget]}, seeds=[0], target=None)
    for run in plan.rungs:
        stream = open_stream(run.config.data, run.config.run.seed)
        assert isinstance(stream, Stream)
        batch = stream.batch(0, run.tokens // 128)
        lengths = [128] * (run.tokens // 128)
        if batch.documents is not None:
            lengths = [int(length) for length in batch.documents.lengths]
        recorded = document_flops(run.config.model, lengths)
        one_step = 8 * 128 * per_token(run.config)
        assert recorded == pytest.approx(run.flops, rel=0.01)
        assert budget * 0.99 < recorded < (budget + one_step) * 1.01
        whole = run.tokens * flops_per_token(run.config.model, 128).total
        assert (whole > 1.05 * recorded) == (packing == "per_document")


def test_without_token_files_a_compute_budget_says_what_it_counts(base: Path) -> None:
    keys = {"data.sources": [{"name": "far", "train": "/nowhere/far.train"}]}
    asked = {"set": keys, "tokens": None, "seeds": [0], "target": None}
    plan = planned(base, isoflop={"flops": [1e9]}, **asked)
    assert [note for note in plan.notes if "tokens of far are not on this machine" in note]
    assert len(plan.notes) == 1
    assert not planned(base, **(asked | {"tokens": [2048]})).notes
