"""The small run of a certificate keeps the run's mixture if it is long enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from allometry.configs.run import RunConfig
from allometry.data.stream import open_stream
from allometry.studies.certificate.small import STEPS, least_sequences, small_run
from allometry.studies.memory.probe import as_probed

REPLAY = (
    "data.replay={ratio: 0.25, sources: [down], "
    "changes: [{after_tokens: 4000, ratio: 0.9, over_tokens: 1000}]}"
)


def test_a_small_run_replays_at_the_first_ratio(
    tiny: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny(REPLAY, "data.sources.0.max_epochs=0.5", "data.continue_sources=true")
    small = small_run(config, tmp_path)
    stream = open_stream(small.data, small.run.seed)
    assert stream.mixture.shares() == pytest.approx({"up": 0.75, "down": 0.25})
    stream.check_run(STEPS * small.batch.sequences)
    assert not small.data.continue_sources


def test_a_batch_of_documents_has_one_whatever_the_ratio(tiny: Callable[..., RunConfig]) -> None:
    documents = (
        *("data.kind=documents", "data.max_document_tokens=64", "batch.micro_batch_sequences=1"),
        "batch.sequences=64",
    )
    assert least_sequences(tiny(*documents)) == 6  # (64 / 32 + 2) / 0.7
    assert least_sequences(tiny(*documents, REPLAY)) == 8  # 1/2 halfway from 0.25 to 0.9


@pytest.mark.parametrize(
    "lineage",
    [
        "run.parent={folder: a, step: 8, changes: [schedule]}",
        "run.initial={folder: a, keep: [weights, data]}",
    ],
)
def test_a_small_run_begins_from_nothing(
    tiny: Callable[..., RunConfig], tmp_path: Path, lineage: str
) -> None:
    for small in (small_run(tiny(lineage), tmp_path), as_probed(tiny(lineage), tmp_path)):
        assert (small.run.parent, small.run.initial, small.run.schedule_from) == (None, None, 0)
