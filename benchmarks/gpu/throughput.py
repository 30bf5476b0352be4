"""Training speed on one GPU: dense models of 125M and 1.2B parameters, bf16, compiled and not.

    python benchmarks/gpu/throughput.py [--only 125m|1b] [--packing concatenated] [--out FILE]

Every variant is a run of ``python -m allometry.launch.train`` on random tokens, as a user would
start it, record on; the numbers are medians over the rows of its metrics.jsonl after the warm-up.
A variant that does not fit the GPU's memory is tried with the next smaller micro-batch. Prints a
table and writes JSON; says so and ends well where there is no GPU. Minutes on an H100.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from allometry.data.synthetic import write_random_store
from allometry.trainer.record.writer import commit, versions

MFU_GOAL = 0.5
WARMUP_STEPS = 3
OUT_OF_MEMORY = "OutOfMemoryError"
# In memory, as the checkpoint at the end of a 1.2B run is 14 GB: its writing is not measured here.
MEMORY_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Variant:
    """A model and how it is trained; micro-batches are tried from the first on."""

    name: str
    preset: str
    model: dict[str, Any]
    sequence_length: int
    sequences: int
    micro_batches: tuple[int, ...]
    timed_steps: int
    compile: bool = True


def variants(only: Sequence[str] | None, micro_batches: Sequence[int] | None) -> list[Variant]:
    """What is measured. A step is 131k tokens: a GPU's share of dense_1b on one node of eight."""
    small = {
        "vocab_size": 50304,
        "width": 768,
        "num_layers": 12,
        "num_heads": 12,
        "ffn_width": 2048,
    }
    found = []
    for compile in (True, False):
        found += [
            Variant("125m", "dense_25m", small, 2048, 64, (64, 32, 16), 25, compile),
            Variant("1b", "dense_1b", {}, 4096, 32, (8, 4, 2, 1), 8, compile),
        ]
    if micro_batches:
        found = [Variant(**{**asdict(v), "micro_batches": tuple(micro_batches)}) for v in found]
    return [v for v in found if not only or v.name in only]


def description(variant: Variant, micro_batch: int, packing: str, folder: Path) -> dict[str, Any]:
    """The configuration of a run."""
    return {
        "base": f"preset:{variant.preset}",
        "run": {"folder": str(folder / "run")},
        "model": variant.model,
        "data": {
            "sequence_length": variant.sequence_length,
            "packing": packing,
            "sources": [{"name": "random", "train": str(folder.parent / "random")}],
        },
        "batch": {"sequences": variant.sequences, "micro_batch_sequences": micro_batch},
        "training": {
            "total_tokens": None,
            "total_steps": WARMUP_STEPS + variant.timed_steps,
            "compute_dtype": "bf16",
            "compile": variant.compile,
        },
        "schedule": {"warmup_tokens": None, "warmup_steps": 0},
        "parallel": {"zero": {"stage": 0}},
        "evaluation": {"every_steps": None},
        "checkpoint": {"every_steps": None, "keep_every_steps": None},
    }


def attempt(
    variant: Variant, micro_batch: int, packing: str, folder: Path
) -> dict[str, Any] | None:
    """One run; None if the GPU's memory was too small. Other failures raise RuntimeError."""
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(json.dumps(description(variant, micro_batch, packing, folder)))
    begun = time.perf_counter()
    command = [sys.executable, "-m", "allometry.launch.train", str(path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    wall = time.perf_counter() - begun
    if finished.returncode:
        if OUT_OF_MEMORY in finished.stderr:
            return None
        raise RuntimeError(f"{command} failed:\n{finished.stdout}\n{finished.stderr}")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    timed = rows[WARMUP_STEPS:]
    assert len(timed) == variant.timed_steps, len(timed)
    facts = json.loads((folder / "run" / "run.json").read_text())
    return {
        "model": variant.name,
        "parameters": facts["plan"]["parameters"]["total"],
        "compile": variant.compile,
        "packing": packing,
        "sequence_length": variant.sequence_length,
        "tokens_per_step": variant.sequences * variant.sequence_length,
        "micro_batch_sequences": micro_batch,
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in timed),
        "mfu": statistics.median(row["mfu"] for row in timed),
        "flops_per_token": facts["plan"]["flops_per_token"],
        "peak": facts["peak"],
        "peak_bytes": rows[-1]["peak_bytes"],
        "first_step_s": rows[0]["time_s"],
        "wall_s": wall,
        "first_loss": rows[0]["loss"],
        "step_seconds": [row["time_s"] for row in rows],
    }


def measure(variant: Variant, packing: str, scratch: Path) -> dict[str, Any]:
    """The variant with its largest micro-batch that fits."""
    for micro_batch in variant.micro_batches:
        folder = scratch / "variant"
        result = attempt(variant, micro_batch, packing, folder)
        shutil.rmtree(folder)
        if result is not None:
            return result
        print(f"{variant.name}: micro-batch {micro_batch} does not fit, trying less", flush=True)
    raise RuntimeError(f"{variant.name} does not fit this GPU even with the smallest micro-batch")


def line(result: dict[str, Any]) -> str:
    compiled = "compiled" if result["compile"] else "eager"
    verdict = "met" if result["mfu"] >= MFU_GOAL else "NOT MET"
    return (
        f"| {result['model']} | {compiled} | {result['packing']} | "
        f"{result['micro_batch_sequences']} x {result['sequence_length']} | "
        f"{result['tokens_per_s']:.0f} | {100 * result['mfu']:.1f} % | "
        f"{result['peak_bytes'] / 2**30:.1f} GiB | {result['first_step_s']:.0f} s | "
        f"MFU >= {100 * MFU_GOAL:.0f} %: {verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", choices=("125m", "1b"), action="append")
    parser.add_argument("--compile", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--packing", choices=("concatenated", "per_document"), action="append")
    parser.add_argument("--micro-batch", type=int, action="append", help="sizes to try, in order")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this benchmark needs a CUDA device, and torch sees none")
        return
    today = datetime.date.today().isoformat()
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    out = given.out or Path(__file__).parents[1] / "results" / f"throughput-{name}-{today}.json"
    results = []
    wanted = {"yes": (True,), "no": (False,), "both": (True, False)}[given.compile]
    place = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    print("| model | | packing | micro-batch | tokens/s | MFU | peak memory | first step | goal |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="allometry-throughput-", dir=place) as folder:
        write_random_store(Path(folder) / "random", 20_000_000, 50_000, mean_length=1024)
        for variant in variants(given.only, given.micro_batch):
            if variant.compile not in wanted:
                continue
            for packing in given.packing or ("concatenated",):
                results.append(measure(variant, packing, Path(folder)))
                print(line(results[-1]), flush=True)
                record = {
                    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    "command": sys.argv,
                    "commit": commit(),
                    "device": torch.cuda.get_device_name(),
                    "versions": versions(),
                    "warmup_steps": WARMUP_STEPS,
                    "results": results,
                }
                out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
