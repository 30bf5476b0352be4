"""Measure the effect of FP8 activations and products on the loss and on saved bytes, on a CPU.

    python benchmarks/precision_products.py [--recipes NAME;NAME] [--kinds dense,moe] [--seeds 3]

Trains byte models on Python's library in bf16, with saved activations, optimizer states or products
in FP8 (emulated), alone and combined. Prints the held-out loss after equal tokens, its difference
to bf16 with the same seed and a 95 % interval, seconds of a step (on a CPU, FP8 only adds time),
bytes of state per parameter, and the bytes saved for the backward pass by one layer of COAT's
shape, in U (one activation in bf16). Each trial is stored in --work when it ends; the same command
continues after an interruption, seed by seed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders.families import mixture
from contenders.machine import facts, source_bytes
from contenders.rules import SIZES, model, standard
from contenders.trials import Log, interval
from pydantic import TypeAdapter
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
SAVED = {"saved_activations": "fp8"}
STATES = {"kind": "fp8"}


@dataclass(frozen=True)
class Recipe:
    """Config sections ``precision`` and ``optimizer.states``."""

    precision: dict[str, Any] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    BASE: Recipe(),
    "states": Recipe(states=STATES),
    "saved": Recipe(SAVED),
    "saved, states": Recipe(SAVED, STATES),
    "fp8_rowwise": Recipe({"linears": "fp8_rowwise"}),
    "fp8_rowwise, saved, states": Recipe({"linears": "fp8_rowwise", **SAVED}, STATES),
    "fp8_tensorwise": Recipe({"linears": "fp8_tensorwise"}),
    "fp8_blockwise": Recipe({"linears": "fp8_blockwise"}),
}


@dataclass(frozen=True, slots=True, order=True)
class Trial:
    kind: str
    recipe: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials."""

    size: str
    steps: int


def description(kind: str, size: str) -> ModelConfig:
    width, layers = SIZES[size]
    if kind == "dense":
        return model(size)
    # A token uses 2 of 8 experts, together half as wide as the dense feed-forward; at "10m" the
    # mixture has as many parameters as the dense model.
    experts: ModelConfig = mixture(width, 8, 2, width, "softmax")
    return experts.model_copy(update={"num_layers": -(-6 * layers // 10)})


def in_bf16(description: ModelConfig, recipe: Recipe, seed: int = 0) -> Probe:
    """Build a probe that computes in bf16, with the FP8 settings of the recipe."""
    config = AdamW.model_validate({"lr": LR, "states": recipe.states or {"kind": "fp32"}})
    probe = Probe(description, standard(), config, seed)
    assert probe.model.embedding is not None
    probe.model.compute_dtype = probe.model.embedding.dtype = torch.bfloat16
    use_precision(probe.model, PrecisionConfig.model_validate(recipe.precision))
    return probe


def run(settings: Settings, trial: Trial) -> dict[str, Any]:
    torch.set_num_threads(1)
    probe = in_bf16(description(trial.kind, settings.size), RECIPES[trial.recipe], trial.seed)
    count = settings.steps * SEQUENCES
    pool = source_bytes(count + HELD_OUT, LENGTH)
    tokens = sample(pool[:-HELD_OUT], count, trial.seed)
    schedule = Schedule(
        TypeAdapter(ScheduleConfig).validate_python({"kind": "wsd", "decay_fraction": 0.2}),
        settings.steps,
        settings.steps // 20,
    )
    losses, seconds = [], []
    for step in range(1, settings.steps + 1):
        begun = time.process_time()
        batch = tokens[(step - 1) * SEQUENCES : step * SEQUENCES]
        losses.append(probe.step(batch, fraction=schedule.fraction(step), clip=1.0))
        seconds.append(time.process_time() - begun)
    parameters = sum(p.numel() for p in probe.model.parameters())
    held = sum(t.nbytes for state in probe.optimizer.state.values() for t in state.values())
    return {
        "held_out": probe.loss(pool[-HELD_OUT:]),
        "last_losses": losses[-20:],
        "cpu_seconds_of_a_step": statistics.median(seconds),
        "parameters": parameters,
        "state_bytes": held / parameters,
    }


def kept_units(kind: str, recipe: Recipe) -> float:
    """Return the bytes saved for one layer's backward, in bf16 activations: COAT's F = 8/3 D."""
    width, B, L = 192, 2, 128
    shape = DenseModel(vocab_size=128, width=width, num_layers=2, num_heads=3, ffn_width=512)
    experts: ModelConfig = mixture(width, 8, 2, 256, "softmax").model_copy(
        update={"num_heads": 3, "qk_norm": False}
    )
    made = in_bf16(shape if kind == "dense" else experts, recipe).model
    assert kind == "dense" or isinstance(experts.experts, SwiGLUExperts)
    owned = {p.untyped_storage().data_ptr() for p in made.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    geometry = made._geometry(torch.zeros(B, L, dtype=torch.int64), None)
    owned |= {t.untyped_storage().data_ptr() for t in geometry.turn}
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


def summary(kinds: list[str], names: list[str], known: dict[Trial, Any]) -> list[dict[str, Any]]:
    """Return a row for each model and recipe, over the seeds available for both it and bf16."""
    rows = []
    for kind in kinds:
        for name in names:
            seeds = sorted(
                t.seed
                for t in known
                if (t.kind, t.recipe) == (kind, name) and Trial(kind, BASE, t.seed) in known
            )
            if not seeds:
                continue
            found = [known[Trial(kind, name, seed)] for seed in seeds]
            changes = [
                100.0 * (one["held_out"] / known[Trial(kind, BASE, seed)]["held_out"] - 1.0)
                for one, seed in zip(found, seeds, strict=True)
            ]
            mean, half = interval(changes)
            row = {
                "model": kind,
                "recipe": name,
                "parameters": found[0]["parameters"],
                "seeds": len(seeds),
                "held_out": statistics.fmean(one["held_out"] for one in found),
                "changes_percent": changes,
                "change_percent": mean,
                "half_95": half,
                "state_bytes": found[0]["state_bytes"],
                "kept_units": kept_units(kind, RECIPES[name]),
                "cpu_seconds": statistics.median(one["cpu_seconds_of_a_step"] for one in found),
            }
            rows.append(row)
    return rows


def say(rows: list[dict[str, Any]]) -> None:
    print("| model | recipe | seeds | held-out loss | change to bf16 | states | a layer | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        said = "" if row["half_95"] is None else f" ± {row['half_95']:.2f}"
        print(
            f"| {row['model']} | {row['recipe']} | {row['seeds']} | {row['held_out']:.4f} "
            f"| {row['change_percent']:+.2f}{said} % | {row['state_bytes']:.2f} B "
            f"| {row['kept_units']:.2f} U | {row['cpu_seconds']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--recipes", default=";".join(RECIPES), help="names, default: all")
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
    names, kinds = given.recipes.split(";"), given.kinds.split(",")
    for name in names:
        if name not in RECIPES:
            parser.error(f"--recipes names {name!r}; choose of {', '.join(map(repr, RECIPES))}")
    given.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(given.size, given.steps)
    log = Log(given.work / "products.jsonl", settings, Trial)
    trials = [Trial(k, name, seed) for seed in range(given.seeds) for k in kinds for name in names]
    with Workers(given.processes) as workers:
        missing = [trial for trial in trials if trial not in log.known]
        workers.run(partial(run, settings), missing, log.add)
    rows = summary(kinds, names, log.known)
    say(rows)
    result = {**facts(), "quick": given.quick, "settings": asdict(settings), "rows": rows}
    path = given.json or Path(__file__).parent / "results" / (
        f"precision-products-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
