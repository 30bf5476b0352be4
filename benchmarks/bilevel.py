"""Target loss of mixtures: uniform, by ScaleBiO, and by mixing_exponential at equal compute.

    python benchmarks/bilevel.py [--out results.json] [--seeds 3] [--steps 150] [--rate 0.1]

Four synthetic sources: documents of two rules (the next token is 3 x + 1 or 5 x + 7 modulo the
vocabulary, with probability .9), random tokens, and a target of 70 % and 30 % of the rules'
documents. ScaleBiO trains two models for ``--steps`` steps. The law is fitted to the target's loss
after ten runs of a fifth of the steps, at shares drawn uniformly from the simplex: as many tokens
in all. It reads other held-out documents than the results. Then equal runs train on each mixture
and on the target's own shares; the held-out loss of the target has 95 % intervals of Student's t
over seeds. Every seed repeats the choice of the mixture too.
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
from numpy.typing import NDArray
from scipy import stats

from allometry.configs.run import RunConfig
from allometry.data.synthetic import write_store
from allometry.laws.fit.engine import FitOptions, fit
from allometry.laws.mixing import optimal_mixture
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from allometry.studies.bilevel import learn, plan_bilevel
from allometry.studies.sweeps.probe import Probe, read_pools

VOCABULARY, LENGTH, SEQUENCES, DOCUMENTS = 64, 32, 16, 4000
SOURCES = ("first", "second", "random")
TRUE = (0.7, 0.3, 0.0)
RUNS, ALPHA, RATE = 10, 10.0, 1e-2
Shares = NDArray[np.float64]


def document(kind: str, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return a document of a rule, or of random tokens."""
    ids = rng.integers(0, VOCABULARY, LENGTH + 1)
    if kind != "random":
        factor, term = (3, 1) if kind == "first" else (5, 7)
        follows = rng.random(LENGTH + 1) < 0.9
        for at in range(1, LENGTH + 1):
            ids[at] = (factor * ids[at - 1] + term) % VOCABULARY if follows[at] else ids[at]
    return ids


def write(folder: Path) -> NDArray[np.int64]:
    """Write the stores of the sources and of the target; return held-out target sequences."""
    rng = np.random.default_rng(0)
    for kind in SOURCES:
        write_store(folder / kind, [document(kind, rng) for _ in range(DOCUMENTS)])
    kinds = rng.choice(SOURCES, DOCUMENTS + 500, p=TRUE)
    target = [document(str(kind), rng) for kind in kinds]
    write_store(folder / "target", target[:DOCUMENTS])
    return np.array(target[DOCUMENTS:])


def config_of(folder: Path, shares: Shares | None, steps: int) -> RunConfig:
    """Return a run with these shares; None: equal shares, and the target with weight 0."""
    weights = dict.fromkeys(SOURCES, 1.0) | {"target": 0.0}
    if shares is not None:
        weights = dict(zip(SOURCES, shares.tolist(), strict=True))
    return RunConfig.model_validate(
        {
            "run": {"folder": str(folder / "run")},
            "model": {
                **{"kind": "dense", "vocab_size": VOCABULARY, "width": 32, "num_layers": 1},
                **{"num_heads": 2, "ffn_width": 64},
            },
            "data": {
                "sequence_length": LENGTH,
                "sources": [
                    {"name": name, "train": str(folder / name), "weight": weight}
                    for name, weight in weights.items()
                ],
            },
            "batch": {"sequences": SEQUENCES, "micro_batch_sequences": SEQUENCES},
            "training": {"total_steps": steps, "compute_dtype": "fp32"},
            "optimizer": {"kind": "adamw", "lr": RATE},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, steps // 20)},
        }
    )


def trained(folder: Path, shares: Shares, steps: int, seed: int, held: NDArray[np.int64]) -> float:
    """Train a run on a mixture; return its loss on the held-out sequences."""
    config = config_of(folder, shares, steps)
    (pool,) = read_pools(config.data, seed, LENGTH, [steps * SEQUENCES])
    probe = Probe(config.model, config.parameterization, config.optimizer, seed)
    for step in range(steps):
        cosine = 0.55 + 0.45 * np.cos(np.pi * step / steps)
        rows = pool[step * SEQUENCES : (step + 1) * SEQUENCES]
        probe.step(rows, fraction=min(1.0, (step + 1) / max(1, steps // 20)) * cosine, clip=1.0)
    return probe.loss(held)


def by_bilevel(folder: Path, steps: int, seed: int, rate: float) -> Shares:
    """Return the weights that ScaleBiO learns."""
    config = config_of(folder, None, steps)
    plan = plan_bilevel(config, "target", seed, torch.device("cpu"))
    *_, last = learn(plan, ALPHA, rate, seed)
    return last.shares


def by_law(folder: Path, steps: int, seed: int, held: NDArray[np.int64]) -> Shares:
    """Return the best shares by a law of ``RUNS`` runs, together twice ``steps`` steps."""
    drawn = np.random.default_rng(seed).dirichlet(np.ones(3), RUNS)
    losses = [trained(folder, one, 2 * steps // RUNS, seed, held) for one in drawn]
    columns = {name: drawn[:, s].tolist() for s, name in enumerate(SOURCES)}
    rows = Observations.of({**columns, "loss": losses})
    law = fit(form_named("mixing_exponential:" + ",".join(SOURCES)), rows, FitOptions())
    best = optimal_mixture({"target": law}, SOURCES)
    return np.array([best.shares[name] for name in SOURCES])


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean of values over seeds, and half the width of its 95 % interval."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return {"mean": float(np.mean(values)), "half": float(half)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rate", type=float, default=0.1)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {
        name: {"shares": [], "losses": [], "seconds": []}
        for name in ("uniform", "bilevel", "law", "target")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted, held = np.array_split(write(folder), 2)
        for seed in range(asked.seeds):
            for method, one in found.items():
                begun = time.process_time()
                shares = {
                    "uniform": lambda: np.full(3, 1 / 3),
                    "target": lambda: np.array(TRUE),
                    "bilevel": lambda seed=seed: by_bilevel(folder, asked.steps, seed, asked.rate),
                    "law": lambda seed=seed: by_law(folder, asked.steps, seed, fitted),
                }[method]()
                one["seconds"].append(time.process_time() - begun)
                one["shares"].append(shares.tolist())
                one["losses"].append(trained(folder, shares, asked.steps, 100 + seed, held))
    for method, one in found.items():
        one["loss"] = interval(one["losses"])
        shares = ", ".join(f"{share:.3f}" for share in np.mean(one["shares"], 0))
        seconds = np.mean(one["seconds"])
        loss = one["loss"]
        print(f"{method}: {shares}; {loss['mean']:.4f} +- {loss['half']:.4f}; {seconds:.1f} s CPU")
    if asked.out:
        facts = {"steps": asked.steps, "seeds": asked.seeds, "rate": asked.rate, "alpha": ALPHA}
        machine = {"python": platform.python_version(), "torch": torch.__version__}
        asked.out.write_text(json.dumps({**facts, **machine, "methods": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
