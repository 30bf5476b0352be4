"""Forecast the final loss of a cosine or WSD schedule from other curves, on tiny runs.

    allometry prepare builtin:python-code builtin:python-prose --out STORE --vocab-size 1024
    python benchmarks/forecast.py STORE [--steps 800] [--cosine-steps 400] [--seeds 2]
        [--only 0,1] [--work DIR] [--out FILE]

Runs are fp32, on one process with one thread. For each seed the script trains a constant run, a
cosine run (with as many steps, or fewer) and a WSD run that branches from the constant run at four
fifths; the runs differ only in their schedule. The final loss of the WSD run is forecast from the
other two runs, from its own curve before the decay, and half through the decay. Forecasts are of
the held-out loss (every 20 steps, the same 128 sequences), whose last value has no batch noise, and
of the training loss, whose final value is the mean over the last 5 % of the steps (its noise is
printed). Finished runs in DIR are reused; ``--seeds`` and ``--only`` select the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.machine import facts

from allometry.configs.errors import UserError
from allometry.configs.run import RunConfig
from allometry.laws.curves import rates_of
from allometry.laws.forecast import Curve, Forecast, forecast
from allometry.laws.losses import LossChoice, loss_curve
from allometry.laws.runs import Run, read_run
from allometry.trainer.train import train

LENGTH, SEQUENCES, HELD_OUT = 128, 32, 64
WARMUP, DECAY = 50, 0.2
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant"},
    "cosine": {"kind": "cosine", "final_fraction": 0.1},
    "wsd": {"kind": "wsd", "decay_fraction": DECAY, "final_fraction": 0.1},
}
SHARES = {"python-code": 0.75, "python-prose": 0.25}


def description(folder: Path, store: Path, kind: str, seed: int, steps: int) -> RunConfig:
    run: dict[str, Any] = {"folder": str(folder / f"{kind}-{seed}"), "seed": seed}
    branch = round((1.0 - DECAY) * steps)
    if kind == "wsd":
        run["parent"] = {"folder": str(folder / f"constant-{seed}"), "step": branch}
    return RunConfig.model_validate(
        {
            "run": run,
            "model": {
                "kind": "dense",
                "vocab_size": 1024,
                "width": 64,
                "num_layers": 2,
                "num_heads": 4,
                "ffn_width": 192,
                "qk_norm": True,
            },
            "parameterization": {"kind": "mup", "base_width": 64},
            "data": {
                "kind": "sequences",
                "sequence_length": LENGTH,
                "packing": "per_document",
                "tokenizer": str(store / "tokenizer.json"),
                "sources": [
                    {
                        "name": name,
                        "weight": share,
                        **{part: str(store / f"{name}.{part}") for part in ("train", "validation")},
                    }
                    for name, share in SHARES.items()
                ],
            },
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
            "training": {"total_steps": steps, "compute_dtype": "fp32"},
            "optimizer": {"kind": "adamw", "lr": 1.6e-2},
            "schedule": {**SCHEDULES[kind], "warmup_steps": WARMUP},
            "evaluation": {"every_steps": 20, "sequences_per_source": HELD_OUT},
            "checkpoint": {"every_steps": branch if kind == "constant" else None, "keep_last": 3},
            "record": {
                "tensorboard": False,
                "monitors": {"every_steps": None, "singular_values_every_steps": None},
            },
        }
    )


def trained(folder: Path, store: Path, kind: str, seed: int, steps: int) -> Run:
    config = description(folder, store, kind, seed, steps)
    path = Path(config.run.folder)
    if not (path / "metrics.jsonl").exists() or read_run(path).metrics["step"][-1] < steps:
        train(config, device=torch.device("cpu"), callbacks=[])
    return read_run(path)


def curve(run: Run, loss: str, until: int | None = None) -> Curve:
    rates = rates_of(run)
    steps, losses = loss_curve(run, LossChoice.parse(loss))
    kept = np.isfinite(losses) & (steps <= (until or steps[-1]))
    return Curve(run.folder.name, steps[kept].astype(np.int64), losses[kept], rates)


def measured(run: Run, loss: str) -> tuple[float, float]:
    """Return the final loss and its standard error."""
    steps, losses = loss_curve(run, LossChoice.parse(loss))
    if loss != "train":
        return float(losses[np.isfinite(losses)][-1]), 0.0
    last = losses[steps > 0.95 * steps[-1]]
    return float(last.mean()), float(last.std(ddof=1) / np.sqrt(len(last)))


def line(name: str, found: Forecast, truth: float, noise: float) -> dict[str, Any]:
    facts = {
        "from": name,
        "forecast": found.loss,
        "low": found.low,
        "high": found.high,
        "measured": truth,
        "noise": noise,
        "error": found.loss / truth - 1.0,
        "covered": found.low <= truth <= found.high,
        "gain": found.quality.gain.mean,
        "unmeasured": list(found.quality.unmeasured),
        "values": found.values,
    }
    print(
        f"  {name:32} {found.loss:.4f} ({found.low:.4f} to {found.high:.4f}), measured "
        f"{truth:.4f} +- {noise:.4f}: {facts['error']:+.2%}"
        + ("" if facts["covered"] else "  OUTSIDE")
    )
    return facts


def judge(runs: dict[str, Run], loss: str, steps: int) -> list[dict[str, Any]]:
    whole = {kind: curve(found, loss) for kind, found in runs.items()}
    target = whole["wsd"].rates
    truth, noise = measured(runs["wsd"], loss)
    start = round((1.0 - DECAY) * steps)
    before = curve(runs["wsd"], loss, until=start)
    halfway = curve(runs["wsd"], loss, until=(start + steps) // 2)
    sources = {
        "constant + cosine": [whole["constant"], whole["cosine"]],
        "constant": [whole["constant"]],
        "cosine": [whole["cosine"]],
        "its own stable phase": [before],
        "its own stable phase + cosine": [before, whole["cosine"]],
        "itself, half through its decay": [halfway],
    }
    found = []
    for name, curves in sources.items():
        try:
            found.append(line(name, forecast(curves, target), truth, noise))
        except UserError as error:
            print(f"  {name:32} none: {error}")
            found.append({"from": name, "none": str(error)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--cosine-steps", type=int)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", help="seeds, as 0,1 (default: all of --seeds)")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="allometry-forecast-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps, results = arguments.steps, []
    lengths = {"constant": steps, "cosine": arguments.cosine_steps or steps, "wsd": steps}
    chosen = [int(seed) for seed in (arguments.only or "").split(",") if seed]
    torch.set_num_threads(1)
    begun = time.process_time()
    for seed in chosen or range(arguments.seeds):
        runs = {
            kind: trained(folder, arguments.store, kind, seed, length)
            for kind, length in lengths.items()
        }
        for loss in ("validation", "train"):
            print(f"seed {seed}, {loss} loss, WSD final:")
            results.append({"seed": seed, "loss": loss, "forecasts": judge(runs, loss, steps)})
    seconds = time.process_time() - begun
    print(f"{seconds:.0f} s of the process")
    if arguments.out:
        content = {**facts(), "lengths": lengths, "seconds": seconds, "results": results}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
