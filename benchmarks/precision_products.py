"""What FP8 activations and products cost in quality, and the bytes a layer keeps, on a CPU.

    python benchmarks/precision_products.py [--only activations|linears] [--size 10m] [--seeds 3]

Byte models on Python's library, computing in bf16. `activations`: saved activations in FP8;
`linears`: products in FP8, emulated, alone and with saved activations. Printed: held-out loss after
equal tokens, its difference to bf16 of the same seed with a 95 % interval, seconds of a step (FP8
only costs time on a CPU), and of one layer of COAT's shape the bytes that wait for backward, in U,
one activation in bf16. Each trial is kept in --work as soon as it ends: the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders.families import mixture
from contenders.machine import facts, source_bytes
from contenders.rules import SIZES, model, standard
from pydantic import TypeAdapter
from scipy import stats
from torch import Tensor

from allometry.configs.model import DenseModel, ModelConfig, SwiGLUExperts
from allometry.configs.optimization import AdamW, ScheduleConfig
from allometry.configs.precision import PrecisionConfig
from allometry.models.precision import use_precision
from allometry.models.products import Stacked, cast_once
from allometry.optim.schedule import Schedule
from allometry.studies.sweeps.probe import Probe, sample
from allometry.studies.sweeps.workers import Workers

LENGTH, SEQUENCES, HELD_OUT = 128, 8, 128
LR = 2.0**-8
BASE = "bf16"
RECIPES = ("fp8_tensorwise", "fp8_rowwise", "fp8_blockwise")
SAVED = {"saved_activations": "fp8"}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "activations": {BASE: {}, "saved": SAVED},
    "linears": {
        BASE: {},
        **{recipe: {"linears": recipe} for recipe in RECIPES},
        "fp8_rowwise, saved": {"linears": "fp8_rowwise", **SAVED},
    },
}


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    kind: str
    precision: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """What all trials share."""

    size: str
    steps: int


def description(kind: str, size: str) -> ModelConfig:
    width, _ = SIZES[size]
    # Of the mixture a token uses 2 of 8 experts, together as wide as half the dense feed-forward.
    return model(size) if kind == "dense" else mixture(width, 8, 2, width, "softmax")


def in_bf16(description: ModelConfig, precision: dict[str, Any], seed: int = 0) -> Probe:
    """A probe that computes in bf16, with FP8 as asked."""
    config = AdamW(lr=LR)
    probe = Probe(description, standard(), config, seed)
    assert probe.model.embedding is not None
    probe.model.compute_dtype = probe.model.embedding.dtype = torch.bfloat16
    use_precision(probe.model, PrecisionConfig.model_validate(precision))
    return probe


def run(settings: Settings, trial: Trial) -> dict[str, Any]:
    torch.set_num_threads(1)
    precision = {**PARTS["activations"], **PARTS["linears"]}[trial.precision]
    probe = in_bf16(description(trial.kind, settings.size), precision, trial.seed)
    count = settings.steps * SEQUENCES
    pool = source_bytes(count + HELD_OUT, LENGTH)
    tokens = sample(pool[:-HELD_OUT], count, trial.seed)
    schedule = Schedule(
        TypeAdapter(ScheduleConfig).validate_python({"kind": "wsd", "decay_fraction": 0.2}),
        settings.steps,
        settings.steps // 20,
    )
    losses, begun = [], time.perf_counter()
    for step in range(1, settings.steps + 1):
        batch = tokens[(step - 1) * SEQUENCES : step * SEQUENCES]
        losses.append(probe.step(batch, fraction=schedule.fraction(step), clip=1.0))
    return {
        "held_out": probe.loss(pool[-HELD_OUT:]),
        "last_losses": losses[-20:],
        "seconds_of_a_step": (time.perf_counter() - begun) / settings.steps,
    }


def kept_units(kind: str, precision: dict[str, Any]) -> float:
    """Bytes that wait for the backward of one layer, in activations of bf16: COAT's F = 8/3 D."""
    width, B, L = 192, 2, 128
    shape = DenseModel(vocab_size=128, width=width, num_layers=2, num_heads=3, ffn_width=512)
    experts: ModelConfig = mixture(width, 8, 2, 256, "softmax").model_copy(
        update={"num_heads": 3, "qk_norm": False}
    )
    made = in_bf16(shape if kind == "dense" else experts, precision).model
    assert kind == "dense" or isinstance(experts.experts, SwiGLUExperts)
    owned = {p.untyped_storage().data_ptr() for p in made.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    geometry = made._geometry(torch.zeros(B, L, dtype=torch.int64), None)
    owned |= {t.untyped_storage().data_ptr() for t in (geometry.cos_BL1h, geometry.sin_BL1h)}
    x = torch.randn(B, L, width).bfloat16().requires_grad_()
    with cast_once(made, torch.bfloat16):
        owned |= {
            stacked.copy.untyped_storage().data_ptr()
            for module in made.modules()
            for stacked in vars(module).values()
            if isinstance(stacked, Stacked) and stacked.copy is not None
        }
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made.blocks["1"](x, geometry)
    kept = sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in owned)
    return kept / (B * L * width * 2)


class Log:
    """A file of trials by settings, one line each."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, asdict(settings)
        self.known: dict[Trial, Any] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for row in map(json.loads, text.split("\n")[:-1]):
            if row["settings"] == self.settings:
                self.known[Trial(**row["trial"])] = row["found"]

    def add(self, trial: Trial, found: dict[str, Any]) -> None:
        self.known[trial] = found
        row = {"settings": self.settings, "trial": asdict(trial), "found": found}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def interval(differences: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of the 95 % interval of paired differences (Student's t)."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def run_part(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run what is missing of a part and print its table."""
    settings, kinds = Settings(given.size, given.steps), given.kinds.split(",")
    log = Log(given.work / "products.jsonl", settings)
    names = PARTS[part]
    trials = [Trial(k, name, seed) for seed in range(given.seeds) for k in kinds for name in names]
    with Workers(given.processes) as workers:
        missing = [trial for trial in trials if trial not in log.known]
        workers.run(partial(run, settings), missing, log.add)
    rows = []
    print("| model | precision | held-out loss | change to bf16 | kept by a layer | s/step |")
    print("|---|---|---|---|---|---|")
    for kind in kinds:
        of = {
            name: [log.known[Trial(kind, name, seed)] for seed in range(given.seeds)]
            for name in names
        }
        for name, found in of.items():
            changes = [
                100.0 * (one["held_out"] / other["held_out"] - 1.0)
                for one, other in zip(found, of[BASE], strict=True)
            ]
            mean, half = interval(changes)
            row = {
                "model": kind,
                "precision": name,
                "held_out": statistics.fmean(one["held_out"] for one in found),
                "change_percent": mean,
                "half_95": half,
                "kept_units": kept_units(kind, names[name]),
                "seconds": statistics.median(one["seconds_of_a_step"] for one in found),
            }
            rows.append(row)
            said = "" if half is None else f" ± {half:.2f}"
            print(
                f"| {kind} | {name} | {row['held_out']:.4f} | {mean:+.2f}{said} % "
                f"| {row['kept_units']:.2f} U | {row['seconds']:.2f} |"
            )
    return {"settings": asdict(settings), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--kinds", default="dense,moe")
    parser.add_argument("--steps", type=int, default=500, help="of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-precision"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.quick:
        given.size, given.seeds, given.steps = "tiny", 2, 20
    given.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**facts(), "quick": given.quick}
    for part in given.only or PARTS:
        result[part] = run_part(part, given)
    path = given.json or Path(__file__).parent / "results" / (
        f"precision-products-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
