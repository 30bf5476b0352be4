"""Measure the data path on one core: time to the first batch, packing throughput, preparation.

    python benchmarks/data.py [--json] [--skip-prepare]

First batch: opens a store of 1e9 tokens in 1e6 documents (a sparse file, so that disk speed is
excluded) and reads 8 sequences of 2048. Throughput: packed batches from a store of random tokens
that fits in memory. Preparation: the built-in corpora with a BPE of 8192 ids.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.data import SequenceData
from allometry.data.mixture import Mixture
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.stream import Stream
from allometry.data.synthetic import write_random_store, write_sparse_store


def config(prefix: Path, length: int, packing: str = "per_document") -> SequenceData:
    sources = [{"name": "s", "train": str(prefix)}]
    return SequenceData.model_validate(
        {"sequence_length": length, "packing": packing, "sources": sources}
    )


def first_batch(folder: Path) -> dict[str, Any]:
    write_sparse_store(folder / "sparse", 10**9, 10**6)
    times = []
    for seed in range(5):
        start = time.perf_counter()
        Stream(config(folder / "sparse", 2048), seed).batch(10_000, 8)
        times.append(time.perf_counter() - start)
    return {"first_batch_s": times[0], "first_batch_median_s": statistics.median(times)}


def throughput(folder: Path) -> dict[str, Any]:
    found = {}
    for mean in (50, 500, 5000):
        write_random_store(folder / f"random{mean}", 50_000_000, 50_000, mean_length=mean)
        for packing in ("per_document", "concatenated"):
            stream = Stream(config(folder / f"random{mean}", 2048, packing), 0)
            stream.batch(0, 8)
            rates = []
            for repeat in range(5):
                start = time.perf_counter()
                for step in range(40):
                    stream.batch((repeat * 40 + step) * 8, 8)
                rates.append(40 * 8 * 2048 / (time.perf_counter() - start))
            found[f"{packing}_{mean}_tokens_per_document_Mtok_per_s"] = (
                statistics.median(rates) / 1e6
            )
    return found


def mixture() -> dict[str, Any]:
    found = {}
    for sources in (2, 64):
        schedule = Mixture(np.random.default_rng(0).uniform(0.1, 1, sources).tolist())
        start = time.perf_counter()
        for k in range(500):
            schedule.sources(10**12 + 8 * k, 8)
        found[f"mixture_{sources}_sources_us_per_batch"] = (time.perf_counter() - start) / 500 * 1e6
    return found


def preparation(folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    inputs = ("builtin:python-code", "builtin:python-prose")
    manifest = prepare(PrepareRequest(inputs, str(folder / "prepared"), vocab_size=8192))
    tokens = sum(s.tokens for source in manifest.sources.values() for s in source.splits.values())
    return {"prepare_builtin_s": time.perf_counter() - start, "prepare_builtin_tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--skip-prepare", action="store_true", help="leave the slowest part out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {**first_batch(folder), **throughput(folder), **mixture()}
        if not arguments.skip_prepare:
            found |= preparation(folder)
    found["machine"] = f"{platform.machine()}, numpy {np.__version__}"
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        print(f"{key:60} {value:.3f}" if isinstance(value, float) else f"{key:60} {value}")


if __name__ == "__main__":
    main()
