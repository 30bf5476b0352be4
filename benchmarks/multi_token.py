"""Multi-token prediction on and off: held-out loss of the main head, and accepted drafts.

    python benchmarks/multi_token.py [--out results.json] [--seeds 3] [--steps 400]

Trains `preset:ladder_base` on the built-in corpora with equal tokens, without and with one depth of
multi-token prediction, for each seed (initial values and order of samples). Prints the held-out
loss of the main head by source, the losses of training over the last tenth of the steps, the share
of accepted drafts, and the share for a bigram table of the training tokens: the most frequent
successor of a token, in place of depth 1. Differences are taken seed by seed, with 95 % intervals
of Student's t.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from allometry.configs.loader import load
from allometry.configs.run import RunConfig
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.store import TokenStore
from allometry.interop.huggingface.weights import CheckpointWeights
from allometry.models.loss import IGNORE
from allometry.models.multi_token import ahead_of, followed
from allometry.parallel.mesh import open_mesh
from allometry.scaling.plan import RunPlan
from allometry.trainer.assemble import make_model
from allometry.trainer.evaluate import evaluating, held_out_of
from allometry.trainer.sources import open_sources
from allometry.trainer.train import train

SOURCES = ("python-code", "python-prose")
VOCABULARY, BATCH, LENGTH = 2048, 8, 128


def configured(store: Path, folder: Path, seed: int, steps: int, weight: float) -> RunConfig:
    """Return the run of a seed; ``weight`` 0: without multi-token prediction."""
    places = [
        {
            "name": name,
            "train": str(store / f"{name}.train"),
            "validation": str(store / f"{name}.validation"),
            "weight": share,
        }
        for name, share in zip(SOURCES, (0.75, 0.25), strict=True)
    ]
    return load(
        "preset:ladder_base",
        [
            f"run.folder={folder}",
            f"run.seed={seed}",
            f"data.tokenizer={store / 'tokenizer.json'}",
            f"data.sources={json.dumps(places)}",
            f"training.total_tokens={steps * BATCH * LENGTH}",
            *([f"model.multi_token={{depth: 1, weight: {weight}}}"] if weight else []),
        ],
    )


def bigrams(store: Path) -> torch.Tensor:
    """Return the most frequent successor of each token in the training documents, int64 [V]."""
    counts = np.zeros((VOCABULARY, VOCABULARY), np.int64)
    for name in SOURCES:
        tokens = TokenStore(store / f"{name}.train")
        for document in range(tokens.num_documents):
            one = tokens.read(document).astype(np.int64)
            np.add.at(counts, (one[:-1], one[1:]), 1)
    return torch.from_numpy(counts.argmax(1))


@torch.no_grad()
def accepted_bigrams(config: RunConfig, successor_V: torch.Tensor) -> float:
    """Return the share of held-out tokens for which the table agrees with the main head.

    The tokens are those of the column ``drafts_accepted``.
    """
    agreed = compared = 0
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        plan = RunPlan.of(config, 1)
        parallel = make_model(config, plan, mesh)
        step = Path(config.run.folder) / "checkpoints" / f"step-{plan.total_steps}"
        weights = CheckpointWeights(step)
        for name, parameter in parallel.named_parameters():
            parameter.copy_(weights.read(name))
        (model,) = parallel.parts.values()
        held_out = held_out_of(config, open_sources(config).in_stage(0), None, mesh)
        with evaluating([model]):
            for batch in held_out.batches:
                main_BL = model(batch.tokens_BL, None, batch.documents).argmax(-1)
                guess_BL = successor_V[batch.tokens_BL]  # of the token after each token
                ahead_MBL = ahead_of(batch.targets_BL, batch.documents, 1)
                counted_BL = (ahead_MBL[1] != IGNORE) & followed(batch.targets_BL, batch.documents)
                here_T = counted_BL.flatten().roll(1)  # position i + 1 for each draft at i
                agreed += int(((main_BL == guess_BL).flatten() & here_T).sum())
                compared += int(counted_BL.sum())
    return agreed / compared


def measured(config: RunConfig, successor_V: torch.Tensor) -> dict[str, float]:
    """Train a run and return its numbers."""
    start = time.perf_counter()
    train(config, device=torch.device("cpu"), callbacks=[])
    lines = (Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    late, last = rows[-len(rows) // 10 :], rows[-1]
    found = {name: last[f"validation/{name}"] for name in SOURCES}
    found["train"] = float(np.mean([row["loss"] for row in late]))
    if config.model.multi_token is not None:
        found["depth 1"] = float(np.mean([row["multi_token/1"] for row in late]))
        found["drafts accepted"] = last["drafts_accepted"]
        found["bigrams accepted"] = accepted_bigrams(config, successor_V)
    return found | {"seconds": time.perf_counter() - start}


def interval(values: list[float]) -> str:
    """Return the mean and its 95 % interval of Student's t."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{np.mean(values):.4f} ± {half:.4f}"


def main() -> None:
    """Print a table and write the numbers of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--weight", type=float, default=0.3)
    asked = parser.parse_args()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = tuple(f"builtin:{name}" for name in SOURCES)
        prepare(PrepareRequest(inputs=names, out=str(store), vocab_size=VOCABULARY), quiet=True)
        successor_V = bigrams(store)
        for seed in range(asked.seeds):
            for weight in (0.0, asked.weight):
                where = Path(folder) / f"{seed}-{weight:g}"
                config = configured(store, where, seed, asked.steps, weight)
                runs.append({"seed": seed, "weight": weight, **measured(config, successor_V)})
                print(json.dumps(runs[-1]), flush=True)
    off, on = ([run for run in runs if bool(run["weight"]) == flag] for flag in (False, True))
    for name in on[0]:
        if name in ("seed", "weight"):
            continue
        line = f"{name:20} with {interval([run[name] for run in on])}"
        if name in off[0]:
            gaps = [two[name] - one[name] for one, two in zip(off, on, strict=True)]
            line += f"  without {interval([run[name] for run in off])}  gap {interval(gaps)}"
        print(line)
    if asked.out is not None:
        facts = {"torch": torch.__version__, "processor": platform.processor(), **vars(asked)}
        asked.out.write_text(json.dumps({"facts": facts, "runs": runs}, indent=1, default=str))


if __name__ == "__main__":
    main()
