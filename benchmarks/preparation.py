"""Measure preparation in tasks: peak memory and tokens/s, over sizes of the corpus and of shards.

    python benchmarks/preparation.py [--unit-mb 10] [--out FILE]

The corpus is the code of Python's standard library, repeated with a number before each document, as
JSON Lines. A row is one command ``allometry prepare --engine datatrove:local --workers 1``, whose
tasks run one after another in one process; peak memory is the largest resident size of that process
and of its children. Rows: 1 and 4 units in shards of one unit, and 4 units in one shard, after one
small corpus, whose processor seconds (imports, plan) are subtracted. ``join``: bytes of index
written per second by the last step, for documents of two shards. ``planned``: arithmetic for 10 TB
of text on 64 nodes of 64 cores, from the row with 4 shards; ``unit`` is 1e6 bytes of JSON Lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from allometry.data.builtin import open_builtin
from allometry.data.corpus import ReadLog
from allometry.data.joined import write_joined_index
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import HEADER, MAGIC

BYTES, NODES, CORES = 10e12, 64, 64
SHARD_BYTES = 2.5e9
"""Text of one task in the arithmetic."""
VOCAB = 8192


def write_corpus(folder: Path, files: int, size: int) -> int:
    """Write ``files`` of at least ``size`` bytes each; return their size."""
    folder.mkdir()
    corpus = open_builtin("builtin:python-code")
    texts = [one.text for one in corpus.documents(ReadLog(lambda n: None), map)]
    numbers, total = count(), 0
    for part in range(files):
        written = 0
        with (folder / f"{part:03d}.jsonl").open("w", encoding="utf-8") as file:
            while written < size:
                number = next(numbers)
                text = f"# {number}\n{texts[number % len(texts)]}"
                written += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
        total += written
    return total


def run(folder: Path, out: Path, tokenizer: Path, tasks: int) -> dict[str, Any]:
    """Run one command; return its processor seconds, peak memory and tokens."""
    words = [sys.executable, "-m", "allometry.launch.cli", "prepare", f"web={folder}"]
    words += ["--out", str(out), "--tokenizer", str(tokenizer), "--engine", "datatrove:local"]
    words += ["--tasks", str(tasks), "--workers", "1", "--json"]
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as command:
        assert command.stdout is not None
        said = command.stdout.read()
        _, status, used = os.wait4(command.pid, 0)
        command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode:
        raise SystemExit(f"{' '.join(words)} ended with exit code {command.returncode}")
    splits = json.loads(said)["sources"]["web"]["splits"].values()
    return {
        "tasks": tasks,
        "text_bytes": sum(split["bytes"] for split in splits),
        "documents": sum(split["documents"] for split in splits),
        "tokens": sum(split["tokens"] for split in splits),
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.perf_counter() - start,
        "peak_mb": used.ru_maxrss / 1024,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unit-mb", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    unit = int(asked.unit_mb * 1e6)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "tiny", 1, 100_000)
        request = PrepareRequest(
            ("builtin:python-code",), str(folder / "t"), vocab_size=VOCAB, max_documents=400
        )
        prepare(request, quiet=True)
        tokenizer = folder / "t/tokenizer.json"
        bare = run(folder / "tiny", folder / "out-bare", tokenizer, 1)
        write_corpus(folder / "one", 1, unit)
        write_corpus(folder / "four", 4, unit)
        rows = [
            run(folder / corpus, folder / f"out-{corpus}-{tasks}", tokenizer, tasks)
            for corpus, tasks in (("one", 1), ("four", 4), ("four", 1))
        ]
        for row in rows:
            seconds = row["cpu_s"] - bare["cpu_s"]
            row["bytes_per_core_s"] = row["text_bytes"] / seconds
            row["tokens_per_core_s"] = row["tokens"] / seconds
        joined = join(folder)
    result = {
        "benchmark": "preparation",
        "unit_mb": asked.unit_mb,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "bare": bare,
        "rows": rows,
        "join": joined,
        "planned": planned(rows[1], joined),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
