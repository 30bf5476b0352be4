"""Measure parallel streams (ParScale): held-out loss with P = 1, 2, 4 streams at equal tokens.

    allometry prepare builtin:python-code builtin:python-prose --out store/small --vocab-size 1024
    python benchmarks/streams.py --store store/small [--seeds 0 1 2] [--steps 120] [--out FILE]

Every run trains a model of 1.0M parameters (plus those of its streams) on the same tokens in the
same order, at one learning rate that is not tuned for each P. Reported are the losses of the
held-out splits at the end, seconds of training on one CPU thread, and the mean cosine between the
streams of a token after the final norm, which is 1 for equal streams.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contenders.machine import facts

from allometry.configs.run import RunConfig
from allometry.models.build import build_model
from allometry.scaling.count import count_parameters, flops_per_token
from allometry.scaling.parameterization import Parameterization
from allometry.trainer.train import train

SOURCES = ("python-code", "python-prose")
LENGTH, SEQUENCES = 128, 16


def config_of(count: int, prefix: int, steps: int, seed: int, store: Path, out: Path) -> RunConfig:
    """Return the run with ``count`` streams."""
    streams = {"count": count, "prefix_tokens": prefix} if count > 1 else None
    return RunConfig.model_validate(
        {
            "run": {"folder": str(out / f"p{count}-{seed}"), "seed": seed},
            "model": {
                "kind": "dense",
                "vocab_size": 1024,
                "width": 128,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 2,
                "ffn_width": 352,
                "qk_norm": True,
                "streams": streams,
            },
            "data": {
                "sequence_length": LENGTH,
                "packing": "concatenated",
                "tokenizer": str(store / "tokenizer.json"),
                "sources": [
                    {
                        "name": name,
                        "train": str(store / f"{name}.train"),
                        "validation": str(store / f"{name}.validation"),
                        "weight": 0.5,
                    }
                    for name in SOURCES
                ],
            },
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
            "training": {"total_steps": steps, "compute_dtype": "fp32"},
            "optimizer": {"kind": "adamw", "lr": 5e-3},
            "schedule": {"kind": "wsd", "warmup_steps": steps // 10, "decay_fraction": 0.3},
            "evaluation": {"sequences_per_source": 64},
            "checkpoint": {"every_steps": steps},
            "record": {"tensorboard": False, "display_every_steps": steps},
        }
    )


def cosine(config: RunConfig) -> float | None:
    """Return the mean cosine between streams of a token in the trained model, on zeros to V - 1."""
    if config.model.streams is None:
        return None
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = Path(config.run.folder)
    step = config.training.total_steps
    dcp_to_torch_save(folder / "checkpoints" / f"step-{step}", folder / "values.pt")
    saved = torch.load(folder / "values.pt")
    model = build_model(config.model, Parameterization.of_run(config), "fp32")
    model.load_state_dict({n: saved[f"model.{n}"] for n in model.state_dict()})
    assert model.aggregator is not None
    seen: list[torch.Tensor] = []
    model.aggregator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens_BL = torch.arange(8 * LENGTH).view(8, LENGTH)
    with torch.no_grad():
        model(tokens_BL % config.model.vocab_size)
    x_PBLD = seen[0].unflatten(0, (config.model.streams.count, -1))
    pairs = itertools.combinations(x_PBLD, 2)
    return statistics.mean(float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs)


def measure(config: RunConfig) -> dict[str, Any]:
    """Train the run; return its losses, seconds and sizes."""
    start = time.perf_counter()
    train(config, device=torch.device("cpu"), callbacks=[])
    seconds = time.perf_counter() - start
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    losses = {name: last[f"validation/{name}"] for name in SOURCES}
    return {
        "streams": config.model.num_streams,
        "seed": config.run.seed,
        "losses": losses,
        "loss": statistics.mean(losses.values()),
        "seconds": round(seconds, 1),
        "parameters": count_parameters(config.model).total,
        "flops_per_token": flops_per_token(config.model, LENGTH).total,
        "cosine": cosine(config),
    }


def main() -> None:
    """Measure all runs, print a table and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prefix", type=int, default=16)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed, count in itertools.product(asked.seeds, asked.counts):
            each = asked.prefix, asked.steps, seed, asked.store, Path(scratch)
            found.append(measure(config_of(count, *each)))
            print(json.dumps(found[-1]), flush=True)
            if asked.out is not None:  # after each run, so that an interrupted command leaves some
                tokens = asked.steps * SEQUENCES * LENGTH
                whole = {**facts(), "tokens": tokens, "prefix": asked.prefix, "runs": found}
                asked.out.write_text(json.dumps(whole, indent=1) + "\n")
    for count in asked.counts:
        losses = [run["loss"] for run in found if run["streams"] == count]
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        print(f"P={count}: {statistics.mean(losses):.4f} ± {spread:.4f} ({len(losses)} seeds)")


if __name__ == "__main__":
    main()
