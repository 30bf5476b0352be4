"""Measure the time that training waits for a local copy, as a share of a step.

    python benchmarks/local_copies.py [--width 768] [--layers 12] [--tokens 8192] [--folder DIR]
                                      [--runs DIR] [--json FILE]

Trains with a local copy after every second step. ``waited_s`` is the time that training waits for a
copy (the copy of the tensors and the loop's own work for it). The copy is written in the background
on the same processors, so steps with a copy are also compared with the other steps. Each launch
ends with a checkpoint on the disk of ``--runs``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders.machine import facts

from allometry.configs.run import RunConfig
from allometry.data.prepare import PrepareRequest, prepare
from allometry.trainer.save import Copier
from allometry.trainer.state.interval import LLAMA3_DEVICE_HOURS, best_interval_s
from allometry.trainer.state.local import LocalCopies
from allometry.trainer.train import train


def config(given: argparse.Namespace, runs: Path, store: Path) -> RunConfig:
    """Return the config of a dense model with AdamW, on Python's own source code."""
    length = 512
    sequences = given.tokens // length
    return RunConfig.model_validate(
        {
            "run": {"folder": str(runs / "run")},
            "model": {
                "kind": "dense",
                "vocab_size": 8192,
                "width": given.width,
                "num_layers": given.layers,
                "num_heads": given.width // 64,
                "num_kv_heads": given.width // 64,
                "ffn_width": 4 * given.width,
            },
            "data": {
                "sequence_length": length,
                "sources": [{"name": "text", "train": str(store / "text.train")}],
            },
            "batch": {"sequences": sequences, "micro_batch_sequences": min(4, sequences)},
            "training": {"total_steps": given.steps, "compute_dtype": "fp32"},
            "optimizer": {"lr": 1e-4},
            "schedule": {"kind": "constant"},
            "checkpoint": {"local": {"folder": given.folder, "every_steps": 2}},
            "record": {"tensorboard": False, "monitors": {"every_steps": None}},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--folder", default="/dev/shm")
    parser.add_argument("--runs", default=tempfile.gettempdir())
    parser.add_argument("--json")
    given = parser.parse_args()
    waited, written = [], []
    copy, write = Copier.copy, LocalCopies.write

    def timed_copy(self: Copier, *args: Any) -> None:
        begun = time.perf_counter()
        copy(self, *args)
        waited.append(time.perf_counter() - begun)

    def timed_write(self: LocalCopies, *args: Any) -> None:
        write(self, *args)
        assert self.outcome is not None
        assert self.outcome.failure is None, self.outcome
        written.append((self.outcome.seconds, self.outcome.nbytes))

    Copier.copy, LocalCopies.write = timed_copy, timed_write  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=given.runs) as scratch:
        store = Path(scratch)
        text = ("text=builtin:python-code",)
        prepare(PrepareRequest(text, str(store), vocab_size=1024, max_bytes=2_000_000), quiet=True)
        made = config(given, store, store)
        train(made, device=torch.device("cpu"), callbacks=[])
        lines = (store / "run/metrics.jsonl").read_text().splitlines()
        seconds = [json.loads(line)["time_s"] for line in lines]
        parameters = json.loads((store / "run/run.json").read_text())["plan"]["parameters"]["total"]
    step_s = statistics.median(seconds[1:])
    later = waited[1:] or waited  # the first copy allocates the buffers
    nbytes = written[0][1]
    cost_s = statistics.median(later)
    result = {
        **facts(),
        "load": os.getloadavg(),
        "parameters": parameters,
        "tokens": given.tokens,
        "bytes": nbytes,
        "step_s": step_s,
        "steps_s": seconds,
        "waited_s": waited,
        "written_s": [each for each, _ in written],
        "share_of_step": cost_s / step_s,
        "gb_per_s": nbytes / 1e9 / cost_s,
        "best_interval_s_at_1024_devices": best_interval_s(
            cost_s, LLAMA3_DEVICE_HOURS * 3600 / 1024
        ),
    }
    print(json.dumps(result, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
