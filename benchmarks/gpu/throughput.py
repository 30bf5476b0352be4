"""Compare training speed on one GPU with torchtitan and transformers' Llama and Trainer.

    python benchmarks/gpu/throughput.py [--seconds 470] [--only PART]... [--out FILE] [--check]

Parts run in order of importance, each in a separate process as its user would start it, in bf16,
compiled, with 131k tokens per step; our parts are runs of ``python -m allometry.launch.train`` with
the record on. A part that does not fit in the remaining time is skipped; the same command continues
with it, because FILE stores all measurements. Numbers are medians over the steps after the warm-up.
If a micro-batch does not fit in device memory, the next smaller one is tried. Ratios are printed
only between parts measured by one call; other entries of the table read "not yet measured". MFU
counts attention as causal and within documents. ``--check`` rehearses all parts with tiny models on
the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from shapes import REHEARSED, SHAPES, WARMUP_STEPS, Shape, dense_model, model_flops_per_token

from allometry.data.synthetic import write_random_store
from allometry.trainer.record.hardware import peak
from allometry.trainer.record.writer import commit, versions

OUT_OF_MEMORY = "OutOfMemoryError"
MEAN_DOCUMENT = 1024
# In memory: the final checkpoint of a 1.2B run is 14 GB, and writing it is not measured here.
MEMORY_FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class Part:
    """Measurement of one contender. ``seconds``: expected time, compilation included.

    ``overrides``: config of our runs; ``mfu_goal``: required share of the peak FLOP/s.
    """

    name: str
    shape: str
    seconds: int
    contender: str = "allometry"
    overrides: dict[str, Any] = field(default_factory=dict)
    mfu_goal: float | None = None


DOCUMENTS = {"data": {"packing": "per_document"}}
MUONH = {
    "parameterization": {"kind": "hyperp", "base_width": 256, "base_layers": 8},
    "optimizer": {"kind": "muonh", "lr": 1e-2},
}

PARTS = (
    Part("1b", "1b", 55, mfu_goal=0.58),
    Part("1b, torchtitan", "1b", 75, "torchtitan"),
    Part("1b, HF loop", "1b", 75, "hf_loop"),
    Part("1b, documents", "1b", 60, overrides=DOCUMENTS, mfu_goal=0.55),
    Part("125m", "125m", 45, mfu_goal=0.48),
    Part("moe", "moe", 60, mfu_goal=0.35),
    Part("1b, MuonH", "1b", 60, overrides=MUONH),
    Part("1b, HF Trainer", "1b", 75, "hf_trainer"),
    Part("125m, torchtitan", "125m", 60, "torchtitan"),
    Part("125m, HF loop", "125m", 60, "hf_loop"),
    Part("125m, HF Trainer", "125m", 60, "hf_trainer"),
    Part("7b-cut", "7b-cut", 70),
    Part("7b-cut, torchtitan", "7b-cut", 80, "torchtitan"),
    Part("1b, not compiled", "1b", 45, overrides={"training": {"compile": False}}),
)


@dataclass(frozen=True)
class Ratio:
    """Ratio of tokens/s of two parts, and its goal.

    ``less_memory``: the peak memory of ``part`` must be below that of ``over``.
    """

    part: str
    over: str
    goal: float | None
    less_memory: bool = True


RATIOS = (
    Ratio("1b", "1b, torchtitan", 1.10),
    Ratio("1b", "1b, HF loop", 1.15),
    Ratio("1b", "1b, HF Trainer", 1.40),
    Ratio("125m", "125m, torchtitan", 1.10),
    Ratio("125m", "125m, HF loop", 1.15),
    Ratio("125m", "125m, HF Trainer", 1.40),
    Ratio("7b-cut", "7b-cut, torchtitan", 1.10),
    Ratio("1b, documents", "1b", None, less_memory=False),
    Ratio("1b, MuonH", "1b", 0.97, less_memory=False),
)


@dataclass(frozen=True)
class Bench:
    """Device and folders of the parts; ``until``: deadline on ``time.monotonic``'s clock."""

    shapes: dict[str, Shape]
    device: str
    scratch: Path
    until: float

    def measure(self, part: Part) -> dict[str, Any]:
        """Run a part with its largest micro-batch that fits; return the result or its ``error``."""
        shape = self.shapes[part.shape]
        for micro_batch in shape.micro_batches:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            run = self._ours if part.contender == "allometry" else self._peer
            result = run(part, shape, micro_batch, folder)
            if result["error"] != OUT_OF_MEMORY:
                return result
        return result

    def config(self, part: Part, shape: Shape, micro_batch: int, folder: Path) -> dict[str, Any]:
        """Return the config of one of our runs, whose folder is ``folder / "run"``."""
        return merged(
            {
                "base": f"preset:{shape.preset}",
                "run": {"folder": str(folder / "run")},
                "model": shape.model,
                "data": {
                    "sequence_length": shape.length,
                    "packing": "concatenated",
                    "sources": [{"name": "random", "train": str(self.scratch / "random")}],
                },
                "batch": {
                    "sequences": shape.sequences,
                    "micro_batch_sequences": micro_batch,
                    "ramp": None,
                },
                "training": {
                    "total_tokens": None,
                    "total_steps": WARMUP_STEPS + shape.timed_steps,
                    "compute_dtype": "bf16",
                    "compile": True,
                },
                "schedule": {"warmup_tokens": None, "warmup_steps": 0},
                "parallel": {"zero": {"stage": 0}},
                "evaluation": {"every_steps": None},
                "checkpoint": {"every_steps": None, "keep_every_steps": None},
            },
            part.overrides,
        )

    def _ours(self, part: Part, shape: Shape, micro_batch: int, folder: Path) -> dict[str, Any]:
        path = folder / "config.yaml"
        path.write_text(json.dumps(self.config(part, shape, micro_batch, folder)))
        error = self._run([sys.executable, "-m", "allometry.launch.train", str(path)], folder)
        rows = lines_of(folder / "run" / "metrics.jsonl")
        result = measured(shape, micro_batch, [row["time_s"] for row in rows], error)
        if rows:
            timed = rows[WARMUP_STEPS:] or rows[-1:]
            result["mfu"] = statistics.median(row["mfu"] for row in timed)
            result["peak_bytes"] = max(row["peak_bytes"] for row in rows)
            facts = json.loads((folder / "run" / "run.json").read_text())
            kept = ("plan", "peak", "kernels")
            result["facts"] = {key: facts[key] for key in kept if key in facts}
        return result

    def _peer(self, part: Part, shape: Shape, micro_batch: int, folder: Path) -> dict[str, Any]:
        model, out = dense_model(shape), folder / "out.jsonl"
        task = {
            "contender": part.contender,
            "vocab_size": model.vocab_size,
            "width": model.width,
            "num_layers": model.num_layers,
            "num_heads": model.num_heads,
            "num_kv_heads": model.num_kv_heads,
            "ffn_width": model.ffn_width,
            "length": shape.length,
            "sequences": shape.sequences,
            "micro_batch": micro_batch,
            "steps": WARMUP_STEPS + shape.timed_steps,
            "device": self.device,
            "out": str(out),
        }
        (folder / "task.json").write_text(json.dumps(task))
        program = Path(__file__).with_name("peers.py")
        error = self._run([sys.executable, str(program), str(folder / "task.json")], folder)
        rows = [row for row in lines_of(out) if "seconds" in row]
        result = measured(shape, micro_batch, [row["seconds"] for row in rows], error)
        if result["tokens_per_s"] is not None:
            rate = peak(torch.device(self.device), torch.bfloat16).flops_per_s
            result["mfu"] = result["tokens_per_s"] * model_flops_per_token(shape) / rate
            result["peak_bytes"] = max(row["peak_bytes"] for row in rows)
        return result

    def _run(self, command: list[str], folder: Path) -> str | None:
        """Run until the command ends or time is over; return the error, or None."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
        log = folder / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )
            try:
                process.wait(min(threading.TIMEOUT_MAX, max(1.0, self.until - time.monotonic())))
            except subprocess.TimeoutExpired:
                return "the time was over"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode == 0:
            return None
        text = log.read_text(errors="replace")
        return OUT_OF_MEMORY if OUT_OF_MEMORY in text else text[-1500:]


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with the keys of ``changes`` merged into it, section by section."""
    found = dict(tree)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON lines file; an empty list if it is missing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def measured(
    shape: Shape, micro_batch: int, seconds: list[float], error: str | None
) -> dict[str, Any]:
    """Return the measurements of a run; an interrupted run counts if it has timed steps."""
    timed = seconds[WARMUP_STEPS:]
    return {
        "micro_batch": micro_batch,
        "length": shape.length,
        "step_seconds": seconds,
        "tokens_per_s": shape.tokens / statistics.median(timed) if timed else None,
        "first_step_s": seconds[0] if seconds else None,
        "error": error,
    }


class Results:
    """File of results: parts by name, each with the call that measured it."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path = path
        if path.exists():
            self._tree = json.loads(path.read_text(encoding="utf-8"))
            differ = [key for key in facts if self._tree["facts"][key] != facts[key]]
            if differ:
                raise SystemExit(
                    f"{path} was measured with another {differ[0]}; give another --out"
                )
        else:
            self._tree = {"facts": facts, "calls": [], "parts": {}}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._tree["calls"].append({"date": now, "command": sys.argv})

    def __contains__(self, name: str) -> bool:
        return self.of(name) is not None

    def of(self, name: str) -> dict[str, Any] | None:
        """Return a part that has a rate, or None."""
        found = self._tree["parts"].get(name)
        return found if found and found["tokens_per_s"] is not None else None

    def add(self, name: str, result: dict[str, Any]) -> None:
        result["call"] = len(self._tree["calls"])
        self._tree["parts"][name] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._tree, indent=1) + "\n", encoding="utf-8")

    def why_not(self, name: str) -> str:
        found = self._tree["parts"].get(name)
        return "not yet measured" if found is None else str(found["error"]).strip()[-100:]


def table(results: Results, parts: Sequence[Part] = PARTS, ratios: Sequence[Ratio] = RATIOS) -> str:
    """Format the measured parts and their ratios as markdown."""
    lines = [
        "| part | micro-batch | tokens/s | MFU | peak memory | first step | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for part in parts:
        found = results.of(part.name)
        if found is None:
            lines.append(f"| {part.name} | {results.why_not(part.name)} | | | | | |")
            continue
        goal = ""
        if part.mfu_goal is not None:
            verdict = "met" if found["mfu"] >= part.mfu_goal else "NOT MET"
            goal = f"MFU >= {100 * part.mfu_goal:.0f} %: {verdict}"
        lines.append(
            f"| {part.name} | {found['micro_batch']} x {found['length']} "
            f"| {found['tokens_per_s']:,.0f} | {100 * found['mfu']:.1f} % "
            f"| {found['peak_bytes'] / 2**30:.1f} GiB | {found['first_step_s']:.0f} s | {goal} |"
        )
    lines += ["", "| tokens/s of | over | ratio | goal | peak memory |", "|---|---|---|---|---|"]
    lines += [line_of(ratio, results) for ratio in ratios]
    return "\n".join(lines)


def line_of(ratio: Ratio, results: Results) -> str:
    """Format a ratio as a row; both parts must come from the same call."""
    one, other = results.of(ratio.part), results.of(ratio.over)
    if one is None or other is None or one["call"] != other["call"]:
        return f"| {ratio.part} | {ratio.over} | not yet measured in one call | | |"
    value = one["tokens_per_s"] / other["tokens_per_s"]
    goal = memory = ""
    if ratio.goal is not None:
        goal = f">= {ratio.goal:.2f}: {'met' if value >= ratio.goal else 'NOT MET'}"
    if ratio.less_memory and other["peak_bytes"]:
        share = one["peak_bytes"] / other["peak_bytes"]
        memory = f"{share:.2f}: {'met' if share < 1 else 'NOT MET'}"
    return f"| {ratio.part} | {ratio.over} | {value:.3f} | {goal} | {memory} |"


def main(
    title: str = "throughput",
    parts: Sequence[Part] = PARTS,
    ratios: Sequence[Ratio] = RATIOS,
    shapes: dict[str, Shape] = SHAPES,
    rehearsed: dict[str, Shape] = REHEARSED,
) -> None:
    """Measure ``parts`` and write results/TITLE-DEVICE-DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=470, help="time of the whole call")
    names = [part.name for part in parts]
    parser.add_argument("--only", choices=names, action="append", help="parts; default all")
    parser.add_argument("--out", type=Path, default=None, help="file of results, JSON")
    parser.add_argument("--check", action="store_true", help="tiny models on the CPU")
    given = parser.parse_args()
    until = math.inf if given.check else time.monotonic() + given.seconds
    if not given.check and not torch.cuda.is_available():
        print(
            "skipped: this benchmark needs a CUDA device, and torch sees none (--check rehearses)"
        )
        return
    device = "cpu" if given.check else "cuda"
    name = "check" if given.check else torch.cuda.get_device_name().lower().replace(" ", "-")
    default = f"{title}-{name}-{datetime.date.today().isoformat()}.json"
    facts = {"device": name, "commit": commit(), "versions": versions(), "warmup": WARMUP_STEPS}
    out = given.out or Path(__file__).parents[1] / "results" / default
    results = Results(out, facts)
    place = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="allometry-throughput-", dir=place) as scratch:
        tokens = 200_000 if given.check else 20_000_000
        vocabulary = 500 if given.check else 30_000
        write_random_store(Path(scratch) / "random", tokens, vocabulary, mean_length=MEAN_DOCUMENT)
        bench = Bench(rehearsed if given.check else shapes, device, Path(scratch), until)
        for part in parts:
            if part.name in results or (given.only and part.name not in given.only):
                continue
            if time.monotonic() + part.seconds > until:
                print(f"{part.name}: no time left for its {part.seconds} s", flush=True)
                continue
            begun = time.monotonic()
            result = bench.measure(part)
            results.add(part.name, {**result, "shape": asdict(bench.shapes[part.shape])})
            rate = result["tokens_per_s"]
            said = f"{rate:,.0f} tokens/s" if rate else str(result["error"])
            print(f"{part.name}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"written to {out}\n")
    print(table(results, parts, ratios))


if __name__ == "__main__":
    main()
