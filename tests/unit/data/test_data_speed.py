"""Generous lower bounds of speed in CPU time, independent of other load; see benchmarks/data.py."""

import time
from pathlib import Path

from allometry.configs.data import SequenceData
from allometry.data.stream import Stream
from allometry.data.synthetic import write_random_store, write_sparse_store


def config(prefix: Path) -> SequenceData:
    sources = [{"name": "s", "train": str(prefix)}]
    return SequenceData.model_validate({"sequence_length": 2048, "sources": sources})


def test_first_batch_of_a_billion_tokens_within_a_second(tmp_path: Path) -> None:
    write_sparse_store(tmp_path / "s", 10**9, 10**6)
    times = []
    for seed in range(2):
        start = time.process_time()
        batch = Stream(config(tmp_path / "s"), seed).batch(123_456, 8)
        times.append(time.process_time() - start)
    assert batch.num_tokens == 8 * 2048
    assert min(times) < 1.0


def test_five_million_tokens_a_second_on_one_core(tmp_path: Path) -> None:
    write_random_store(tmp_path / "s", 4_000_000, 50_000, mean_length=500)
    stream = Stream(config(tmp_path / "s"), 0)
    stream.batch(0, 8)
    best = 0.0
    for repeat in range(3):
        start = time.process_time()
        for step in range(20):
            batch = stream.batch((repeat * 20 + step) * 8, 8)
        best = max(best, 20 * batch.num_tokens / (time.process_time() - start))
    assert best > 5e6
