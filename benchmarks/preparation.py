"""Measure preparation in tasks: peak memory and tokens/s, over sizes of the corpus and of shards.

    python benchmarks/preparation.py [--unit-mb 10] [--quick] [--out FILE]

The corpus is the code of Python's standard library, repeated with a number before each document, as
JSON Lines. A row is ``prepare_in_tasks`` on the local engine with one worker, whose tasks run one
after another in one process: a fork of this process, so that imports are neither in its processor
seconds nor repeated. ``peak_mb`` is the largest resident size of the fork, imports included. Rows:
1 and 4 units in shards of one unit, 4 units in one shard. ``bare``: a corpus of 100 kB, whose
processor seconds are subtracted from those of the rows. ``writer``: memory that one document takes
in the writer of a shard until the shard ends. ``join``: rate of the last step, which concatenates
indices. ``encode``: text to tokens alone, in this process, without reading or writing files.
``planned``: arithmetic for 10 TB of text on 64 nodes of 64 cores. ``--quick``: encode, join and
planned alone, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from allometry.data.builtin import open_builtin
from allometry.data.corpus import ReadLog
from allometry.data.encode import Encoding, chunks, encode_chunk, train_tokenizer
from allometry.data.joined import write_joined_index
from allometry.data.manifest import Manifest
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import HEADER, MAGIC
from allometry.data.tasks.executors import Engine
from allometry.data.tasks.run import prepare_in_tasks
from allometry.data.writer import TokenWriter, load_megatron

BYTES, NODES, CORES = 10e12, 64, 64
SHARD_BYTES = 2.5e9
"""Text of one task in the arithmetic."""
VOCAB = 8192


def write_corpus(folder: Path, files: int, size: int) -> None:
    """Write ``files`` of at least ``size`` bytes each."""
    folder.mkdir()
    corpus = open_builtin("builtin:python-code")
    texts = [one.text for one in corpus.documents(ReadLog(lambda n: None), map)]
    numbers = count()
    for part in range(files):
        written = 0
        with (folder / f"{part:03d}.jsonl").open("w", encoding="utf-8") as file:
            while written < size:
                number = next(numbers)
                text = f"# {number}\n{texts[number % len(texts)]}"
                written += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")


def write_corpora(folder: Path, unit: int) -> dict[str, Any]:
    """Write the corpora of all rows and a tokenizer."""
    for name, files, size in (("tiny", 1, 100_000), ("one", 1, unit), ("four", 4, unit)):
        write_corpus(folder / name, files, size)
    inputs = ("builtin:python-code",)
    prepare(
        PrepareRequest(inputs, str(folder / "t"), vocab_size=VOCAB, max_documents=400, processes=1),
        quiet=True,
    )
    return {}


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``work`` in a fork; return its result with processor seconds and peak memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        start = time.process_time()
        with os.fdopen(writing, "w") as file:
            result = work()
            json.dump({**result, "cpu_s": time.process_time() - start}, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"a row ended with status {status}")
    return {**json.loads(text), "peak_mb": used.ru_maxrss / 1024}


def run(folder: Path, out: Path, tokenizer: Path, tasks: int) -> dict[str, Any]:
    """Run one preparation in a fork; return its sizes."""

    def work() -> dict[str, Any]:
        request = PrepareRequest((f"web={folder}",), str(out), tokenizer=str(tokenizer))
        made = prepare_in_tasks(request, Engine("local", tasks=tasks, workers=1), quiet=True)
        assert isinstance(made, Manifest)
        splits = made.sources["web"].splits.values()
        return {
            "tasks": tasks,
            "text_bytes": sum(split.bytes or 0 for split in splits),
            "documents": sum(split.documents for split in splits),
            "tokens": sum(split.tokens for split in splits),
        }

    return forked(work)


def encode(folder: Path, documents: int = 500) -> dict[str, Any]:
    """Measure ``encode_chunk`` on the built-in code, with a tokenizer of its first documents."""
    corpus = open_builtin("builtin:python-code")
    texts = list(islice(corpus.documents(ReadLog(lambda n: None), map), documents))
    path = folder / "encode.json"
    train_tokenizer((one.text for one in texts[:100]), VOCAB).save(str(path))
    encoding = Encoding(str(path), "", 0, "uint16", 0)
    encode_chunk(encoding, next(chunks(texts[:1])))  # loads the tokenizer
    start = time.process_time()
    pieces = [piece for chunk in chunks(texts) for piece in encode_chunk(encoding, chunk)]
    seconds = time.process_time() - start
    tokens, size = sum(len(one.tokens) for one in pieces), sum(one.text_bytes for one in pieces)
    return {
        "documents": len(texts),
        "text_bytes": size,
        "tokens": tokens,
        "cpu_s": seconds,
        "bytes_per_core_s": size / seconds,
        "tokens_per_core_s": tokens / seconds,
    }


def writer(folder: Path, documents: int) -> dict[str, Any]:
    """Write documents of two tokens in a fork; return its peak memory."""

    def work() -> dict[str, Any]:
        file = TokenWriter(folder, f"w{documents}", "uint16")
        tokens = np.zeros(2, "uint16")
        for _ in range(documents):
            file.add(tokens, 5, last=True)
        file.finish()
        return {"documents": documents}

    return forked(work)


def join(folder: Path, documents: int = 2_000_000) -> dict[str, float]:
    """Measure the joining of two indices of ``documents`` each."""
    lengths = np.full(documents, 1000, "<i4")
    pointers = np.arange(documents, dtype="<i8") * 2000
    indices = np.arange(documents + 1, dtype="<i8")
    for name in ("a", "b"):
        head = HEADER.pack(MAGIC, 1, 8, documents, documents + 1)
        parts = (head, lengths.tobytes(), pointers.tobytes(), indices.tobytes())
        (folder / f"{name}.idx").write_bytes(b"".join(parts))
    start = time.process_time()
    write_joined_index(folder / "all.idx", [folder / "a.idx", folder / "b.idx"])
    seconds = time.process_time() - start
    size = (folder / "all.idx").stat().st_size
    return {
        "documents": 2 * documents,
        "bytes": size,
        "cpu_s": seconds,
        "mb_per_s": size / seconds / 1e6,
    }


def planned(row: dict[str, Any], joined: dict[str, float]) -> dict[str, float]:
    """Return the arithmetic for ``BYTES`` of text."""
    cores, tasks = NODES * CORES, BYTES / SHARD_BYTES
    documents = BYTES / row["text_bytes"] * row["documents"]
    return {
        "text_bytes": BYTES,
        "cores": cores,
        "tasks": tasks,
        "tokens": BYTES / row["text_bytes"] * row["tokens"],
        "hours_of_tasks": BYTES / row["bytes_per_core_s"] / cores / 3600,
        "minutes_of_a_task": SHARD_BYTES / row["bytes_per_core_s"] / 60,
        "documents": documents,
        "index_bytes": 20 * documents,
        "minutes_of_joining": 20 * documents / joined["mb_per_s"] / 1e6 / 60,
    }


def measured(folder: Path, unit: int) -> dict[str, Any]:
    """Measure the commands and the writer, each in a fork."""
    forked(lambda: write_corpora(folder, unit))
    tokenizer = folder / "t/tokenizer.json"
    load_megatron()
    bare = run(folder / "tiny", folder / "out-bare", tokenizer, 1)
    rows = [
        run(folder / corpus, folder / f"out-{corpus}-{tasks}", tokenizer, tasks)
        for corpus, tasks in (("one", 1), ("four", 4), ("four", 1))
    ]
    for row in rows:
        seconds = row["cpu_s"] - bare["cpu_s"]
        row["bytes_per_core_s"] = row["text_bytes"] / seconds
        row["tokens_per_core_s"] = row["tokens"] / seconds
    written = [writer(folder, documents) for documents in (1000, 1_000_000)]
    growth = written[1]["peak_mb"] - written[0]["peak_mb"]
    return {
        "bare": bare,
        "rows": rows,
        "writer": {"rows": written, "bytes_per_document": growth * 2**20 / 999_000},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unit-mb", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "preparation",
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not asked.quick:
            result |= {"unit_mb": asked.unit_mb, **measured(folder, int(asked.unit_mb * 1e6))}
        result |= {"join": join(folder), "encode": encode(folder)}
    row = result["encode"] if asked.quick else result["rows"][1]
    result["planned"] = planned(row, result["join"])
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
