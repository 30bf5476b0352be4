"""Compare optimizer states in memory, on the host and in a file: memory, tokens/s, disk rates.

    python benchmarks/offload.py [--width 512] [--layers 8] [--steps 8] [--rounds 3]
        [--folder DIR] [--out FILE]
    python benchmarks/offload.py --late 200 [--out FILE]
    python benchmarks/offload.py --check

In each round, every placement of the states trains the same model in its own process. The process's
resident memory is read before the final checkpoint. ``allowed`` is a quarter of the states; it fits
three buckets, the only states in memory when they are stored in a file. Then the optimizer takes
steps alone, with gradients given once; each step lasts until all writes are done and is followed by
a measurement of the disk. ``share of the disk`` is the time to write and read the bytes of the
states once, one after the other, at the measured rates, divided by the step time (median of all
steps). ``bf16`` is the same in bf16 with ZeRO stage 1 (on one process gradients and parameters stay
unsharded); ``masters`` adds states, fp32 parameters and gradients off the device, all except the
gradients in a file. On a CPU, device memory and host memory are the same, so ``cpu`` shows the cost
of moving states without saving memory, and offloaded gradients save none either.

An update in memory is also compared with torch's fused AdamW and with the memory bandwidth: an
update reads parameter, gradient and two moments and writes all but the gradient, 28 bytes per
parameter; the bandwidth is measured by a copy, as bytes read plus bytes written.

``--late STEPS`` instead trains a byte model on Python's library with updates one step late
(``update: delayed``) and with exact updates, with three seeds each, and prints the difference of
the held-out losses.

``--check`` runs everything once with a small model and few steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from contenders.machine import facts, source_bytes
from contenders.trials import interval
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from allometry.configs.execution import Zero
from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_random_store, write_store
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim.build import build_optimizer
from allometry.optim.offload.rates import adam_rate, disk_rates
from allometry.optim.tiered import TieredOptimizer
from allometry.scaling.count import count_parameters
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.record.callbacks import Callback
from allometry.trainer.state.folder import write_atomically
from allometry.trainer.train import train

VOCAB, LENGTH, SEQUENCES = 4096, 256, 4
PLACES = ("memory", "cpu", "half", "nvme", "bf16", "masters")
IN_BF16 = ("bf16", "masters")
UPDATE_BYTES = 28  # per parameter, by AdamW


def states_of(place: str, folder: Path, bucket_mib: float) -> dict[str, Any] | None:
    if place in ("memory", "bf16"):
        return None
    more: dict[str, Any] = {
        "cpu": {},
        "half": {"device": 0.5},
        "nvme": {},
        "masters": {"master_weights": True, "gradients": True},
    }[place]
    if place != "cpu":
        more = more | {"nvme": str(folder / "swap")}
    return more | {"bucket_mib": bucket_mib}


def run_of(asked: argparse.Namespace, place: str, folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"folder": str(folder / place)},
            "model": {
                "kind": "dense",
                "vocab_size": VOCAB,
                "width": asked.width,
                "num_layers": asked.layers,
                "num_heads": asked.width // 64,
                "ffn_width": 3 * asked.width,
            },
            "data": {
                "sequence_length": LENGTH,
                "sources": [{"name": "random", "train": str(folder / "random")}],
            },
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
            "training": {
                "total_steps": asked.steps,
                "compute_dtype": "bf16" if place in IN_BF16 else "fp32",
            },
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "constant"},
            "parallel": {
                "zero": {
                    "stage": int(place in IN_BF16),
                    "optimizer_states": states_of(place, folder, asked.bucket_mib),
                }
            },
            "record": {"tensorboard": False, "monitors": {"every_steps": None}},
        }
    )


class Probe(Callback):
    """Record step times and memory, before the last step of the launch ends."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.resident = self._begun = 0.0

    def before_step(self, step: int) -> None:
        self._begun = time.perf_counter()

    def after_step(self, step: int) -> None:
        self.steps.append(time.perf_counter() - self._begun)
        self.resident = max(self.resident, psutil.Process().memory_info().rss)


class Copy:
    """Attributes of ``parallel/working.py`` for a sharded parameter, of an unsharded parameter."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self._parameter, self.part, self.held = parameter, torch.empty(0), False

    def hold(self) -> None:
        self.part, self.held = self._parameter.detach().bfloat16(), True

    def leave(self) -> None:
        self.show(torch.full((), math.nan).expand(self._parameter.shape))

    def show(self, part: torch.Tensor) -> None:
        self._parameter.data = part


def memory_rate(nbytes: int = 256 << 20, rounds: int = 5) -> float:
    """Return the bytes/s of a copy, counting bytes read and bytes written."""
    source, target = (
        torch.ones(nbytes // 8, dtype=torch.int64),
        torch.zeros(nbytes // 8, dtype=torch.int64),
    )
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begun)
    return 2 * nbytes / statistics.median(seconds)


def training(asked: argparse.Namespace, place: str, folder: Path) -> dict[str, Any]:
    """Train in a separate process; return times, memory and losses."""
    probe, updates, begun = Probe(), [], [0.0]
    register_optimizer_step_pre_hook(lambda *_: begun.append(time.perf_counter()))
    register_optimizer_step_post_hook(lambda *_: updates.append(time.perf_counter() - begun[-1]))
    train(run_of(asked, place, folder), device=torch.device("cpu"), callbacks=[probe])
    skipped = slice(2, None)
    return {
        "resident_bytes": probe.resident,
        "step_s": statistics.median(probe.steps[skipped]),
        "update_s": statistics.median(updates[skipped]),
        "tokens_per_s": SEQUENCES * LENGTH / statistics.median(probe.steps[skipped]),
    }


def stepping(asked: argparse.Namespace, place: str, folder: Path) -> dict[str, Any]:
    """Take optimizer steps alone in a separate process; return their times and the disk's rates."""
    run = run_of(asked, place, folder)
    rules = Parameterization.of_run(run)
    made = build_model(run.model, rules, "fp32")
    initialize(made, rules, 0)
    states = states_of(place, folder, asked.bucket_mib)
    zero = None if states is None else Zero(stage=1, optimizer_states=states)
    masters = place == "masters"
    copies = {p: Copy(p) for n, p in made.named_parameters() if masters and "embed" not in n}
    optimizer = build_optimizer(
        *(made.named_parameters(), parameter_specs(made), rules, run.optimizer),
        zero=zero,
        working=copies,
    )
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.step()
    sizes = optimizer.held_bytes() if isinstance(optimizer, TieredOptimizer) else {}
    away, seconds, shares, rates = sizes.get("nvme", 0), [], [], []
    for _ in range(2 * asked.steps):
        begun = time.perf_counter()
        optimizer.step()
        if isinstance(optimizer, TieredOptimizer):
            list(optimizer.stored())  # wait for all writes
        seconds.append(time.perf_counter() - begun)
        if away:
            disk = disk_rates(folder / "swap", rounds=1)
            rates.append(disk)
            shares.append(away * (1 / disk.write + 1 / disk.read) / seconds[-1])
    found: dict[str, Any] = {
        "step_s": statistics.median(seconds),
        "held": {str(tier): size for tier, size in sizes.items()},
    }
    if away:
        found |= {"shares": shares, "share_of_the_disk": statistics.median(shares), "disk": rates}
    return found


def late_losses(steps: int, folder: Path) -> list[dict[str, Any]]:
    """Return held-out losses of a small byte model by seed, with exact and with delayed updates."""
    text = source_bytes(4096, 128).flatten()
    for name, part in (("train", text[: -1 << 16]), ("held-out", text[-1 << 16 :])):
        write_store(folder / name, [part])
    found = []
    for seed in range(3):
        one: dict[str, Any] = {"seed": seed}
        for update in ("exact", "delayed"):
            run = RunConfig.model_validate(
                {
                    "run": {"folder": str(folder / f"{update}-{seed}"), "seed": seed},
                    "model": {"kind": "dense", "vocab_size": 256, "width": 96, "num_layers": 3,
                              "num_heads": 3, "ffn_width": 256},
                    "data": {"sequence_length": 128, "sources": [
                        {"name": "code", "train": str(folder / "train"),
                         "validation": str(folder / "held-out")}]},
                    "batch": {"sequences": 8, "micro_batch_sequences": 8},
                    "training": {"total_steps": steps, "compute_dtype": "fp32"},
                    "optimizer": {"lr": 3e-3},
                    "schedule": {"kind": "wsd", "warmup_steps": steps // 10, "decay_fraction": 0.2},
                    "evaluation": {"sequences_per_source": 128},
                    "parallel": {"zero": {"optimizer_states": {"update": update}}},
                    "record": {"tensorboard": False, "monitors": {"every_steps": None}},
                }
            )  # fmt: skip
            train(run, device=torch.device("cpu"), callbacks=[])
            rows = (folder / f"{update}-{seed}" / "metrics.jsonl").read_text().splitlines()
            one[update] = json.loads(rows[-1])["validation/code"]
        one["change_percent"] = 100.0 * (one["delayed"] / one["exact"] - 1.0)
        print(f"seed {seed}: exact {one['exact']:.4f}, late {one['delayed']:.4f}", flush=True)
        found.append(one)
    return found


def in_a_process(asked: argparse.Namespace, what: str, place: str, folder: Path) -> dict[str, Any]:
    command = [
        *(sys.executable, __file__, "--child", what, place, "--folder", str(folder)),
        *("--width", str(asked.width), "--layers", str(asked.layers)),
        *("--steps", str(asked.steps), "--bucket-mib", str(asked.bucket_mib)),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, states {result['states_bytes'] / 1e6:.0f}"
        f" MB, allowed {result['allowed_bytes'] / 1e6:.0f} MB, buckets of"
        f" {result['bucket_mib']:g} MiB",
        "place     resident MB  tokens/s  update ms  update alone ms  share of the disk",
    ]
    for place in PLACES:
        rounds = [one[place] for one in result["rounds"]]

        def median(what: str, key: str, of: list[Any] = rounds) -> float:
            return statistics.median(one[what].get(key, float("nan")) for one in of)

        lines.append(
            f"{place:8} {median('training', 'resident_bytes') / 1e6:12.0f}"
            f" {median('training', 'tokens_per_s'):9.0f}"
            f" {1e3 * median('training', 'update_s'):10.0f}"
            f" {1e3 * median('stepping', 'step_s'):16.0f}"
            f" {median('stepping', 'share_of_the_disk'):18.2f}"
        )
    alone = statistics.median(one["memory"]["stepping"]["step_s"] for one in result["rounds"])
    rate, fused = result["parameters"] / alone, result["adam_parameters_per_s"]
    memory, bandwidth = UPDATE_BYTES * rate, result["memory_bytes_per_s"]
    lines.append(
        f"an update alone in memory: {rate / 1e6:.0f} M parameters/s, {rate / fused:.2f} of torch's"
        f" fused AdamW; {memory / 1e9:.2f} GB/s, {memory / bandwidth:.2f} of a copy's"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, usual in (("width", 512), ("layers", 8), ("steps", 8), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--bucket-mib", type=float, default=16.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true", help="a rehearsal with a small model")
    parser.add_argument("--late", type=int, metavar="STEPS", help="losses of late updates alone")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "PLACE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.check:
        asked.width, asked.layers, asked.steps, asked.rounds, asked.bucket_mib = 128, 2, 4, 1, 0.5
    if asked.child:
        what, place = asked.child
        work = training if what == "training" else stepping
        print(json.dumps(work(asked, place, asked.folder)))
        return
    if asked.late:
        with tempfile.TemporaryDirectory(dir=asked.folder) as made:
            found = late_losses(asked.late, Path(made))
        mean, half = interval([one["change_percent"] for one in found])
        print(f"late updates: {mean:+.2f} ± {half:.2f} % of the held-out loss")
        result = facts() | {"steps": asked.late, "seeds": found, "change_percent": mean}
        result |= {"half_95": half}
        if asked.out is not None:
            write_atomically(asked.out, json.dumps(result, indent=1) + "\n")
        return
    model = run_of(asked, "memory", Path("none")).model
    parameters = count_parameters(model).total
    states = 8 * parameters
    result = facts() | {
        "parameters": parameters,
        "states_bytes": states,
        "allowed_bytes": states // 4,
        "bucket_mib": asked.bucket_mib,
        "adam_parameters_per_s": adam_rate(),
        "memory_bytes_per_s": memory_rate(),
        "load": os.getloadavg(),
        "rounds": [],
    }
    for _ in range(asked.rounds):
        one: dict[str, Any] = {}
        for place in PLACES:
            with tempfile.TemporaryDirectory(dir=asked.folder) as made:
                folder = Path(made)
                write_random_store(folder / "random", 1 << 20, VOCAB)
                one[place] = {
                    what: in_a_process(asked, what, place, folder)
                    for what in ("training", "stepping")
                }
        result["rounds"].append(one)
    print(table(result))
    if asked.out is not None:
        write_atomically(asked.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
