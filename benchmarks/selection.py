"""Held-out loss of a target by how documents were chosen from a noisy pool, at equal tokens.

    python benchmarks/selection.py [--out results.json] [--prepared FOLDER] [--seeds 3] [--steps 80]

The pool holds docstrings of the built-in corpus (the target's kind), the same with their tokens
shuffled, near duplicates of a few of them (5 % of the tokens changed), and source code (off
target). Each method keeps the same share of the pool's tokens, and equal runs train on what it
keeps. The target's held-out documents are in two halves: one gives BETR's examples, the other the
loss. Losses have 95 % intervals of Student's t over seeds; differences to random are taken seed by
seed. A seed decides a run's initialisation and order, and the random selection; scores are made
once. Two small runs, each on a random half of the pool, score the other half by perplexity.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from allometry.configs.loader import load
from allometry.data.prepare import PrepareRequest, prepare
from allometry.data.select.betr import Target, betr
from allometry.data.select.features import require
from allometry.data.select.kept import kept_documents
from allometry.data.select.prototypes import prototypes
from allometry.data.select.scores import write_scores
from allometry.data.store import TokenStore
from allometry.data.synthetic import write_store
from allometry.launch.select.commands import Random
from allometry.launch.select.show import random as random_scores
from allometry.studies.perplexity import losses_of_strangers, open_scorer
from allometry.trainer.train import train

KINDS = ("target's kind", "shuffled", "near duplicates", "off target")
SHARES = (0.3, 0.2, 0.25, 0.25)
POOL_TOKENS, LONGEST, KEEP, CLUSTERS = 400_000, 400, 0.25, 40
VOCABULARY, LENGTH, SEQUENCES = 1024, 128, 8
CHANGED = 0.05
Documents = list[NDArray[np.int64]]


def cut(store: TokenStore, tokens: int, rng: np.random.Generator) -> Documents:
    """Documents of a store in random order, cut, until they have ``tokens``."""
    chosen: Documents = []
    for number in rng.permutation(store.num_documents).tolist():
        if tokens <= 0:
            break
        one = store.read(number, 0, min(LONGEST, int(store.lengths[number]))).astype(np.int64)
        if len(one) >= 16:
            chosen.append(one)
            tokens -= len(one)
    return chosen


def prepared(folder: Path) -> Path:
    """The built-in corpora as token files."""
    inputs = ("builtin:python-prose", "builtin:python-code")
    made = PrepareRequest(
        inputs=inputs,
        out=str(folder / "made"),
        vocab_size=VOCABULARY,
        validation_fraction=0.15,
        max_bytes=2_000_000,
        processes=1,
    )
    prepare(made, quiet=True)
    return folder / "made"


def write_pool(folder: Path, made: Path) -> tuple[TokenStore, NDArray[np.int64], Target]:
    """The pool, the kind of each of its documents, and the examples of the target."""
    rng = np.random.default_rng(0)
    prose = TokenStore(made / "python-prose.train")
    wanted = [share * POOL_TOKENS for share in SHARES]
    good = cut(prose, int(wanted[0] + wanted[1]), rng)
    ends = np.cumsum([len(one) for one in good])
    at = int(np.searchsorted(ends, wanted[0]))
    shuffled = [rng.permutation(one) for one in good[at:]]
    few = cut(prose, int(wanted[2] / 20), rng)
    again = []
    for _ in range(20):
        for one in few:
            changed = rng.random(len(one)) < CHANGED
            again.append(np.where(changed, rng.integers(1, prose.vocab_bound, len(one)), one))
    code = cut(TokenStore(made / "python-code.train"), int(wanted[3]), rng)
    documents = [*good[:at], *shuffled, *again, *code]
    kinds = np.repeat(np.arange(4), [at, len(shuffled), len(again), len(code)])
    order = rng.permutation(len(documents))
    write_store(folder / "pool", [documents[number] for number in order.tolist()])
    held = cut(TokenStore(made / "python-prose.validation"), POOL_TOKENS, rng)
    write_store(folder / "held", held[::2])
    return TokenStore(folder / "pool"), kinds[order], Target("prose", held[1::2])


def run(folder: Path, name: str, seed: int, steps: int, select: dict[str, Any] | None) -> float:
    """Train, and return the held-out loss of the target."""
    source = {"name": "pool", "train": f"{folder}/pool", "validation": f"{folder}/held"}
    source |= {} if select is None else {"select": select}
    config = load(
        "preset:demo",
        [
            f"run.folder={folder}/{name}",
            f"run.seed={seed}",
            f"data.sources={json.dumps([source])}",
            "data.tokenizer=null",
            f"data.sequence_length={LENGTH}",
            f"model.vocab_size={TokenStore(folder / 'pool').vocab_bound}",
            *("model.width=64", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=2"),
            "model.ffn_width=192",
            *(f"batch.sequences={SEQUENCES}", f"batch.micro_batch_sequences={SEQUENCES}"),
            *(f"training.total_steps={steps}", "training.compile=false"),
            "training.compute_dtype=fp32",
            f"schedule.warmup_steps={max(2, steps // 10)}",
            f"evaluation.every_steps={steps}",
            "evaluation.sequences_per_source=128",
            f"checkpoint.every_steps={steps}",
            "record.tensorboard=false",
        ],
    )
    train(config, callbacks=[])
    lines = Path(config.run.folder, "metrics.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["validation/pool"])


def score(
    folder: Path, pool: TokenStore, target: Target, steps: int
) -> dict[str, tuple[str, list[str], float]]:
    """Write scores by each scorer: their path, the sides to try, seconds per million tokens."""
    for module in ("sklearn.linear_model", "sklearn.cluster", "sklearn.feature_extraction.text"):
        require(module)  # its import is no part of scoring
    million = pool.num_tokens / 1e6
    found: dict[str, tuple[str, list[str], float]] = {}
    begun = time.perf_counter()
    near = betr(pool, [target])
    seconds = time.perf_counter() - begun
    found["betr"] = (
        str(write_scores(pool, "betr", near.scores, {}).path), ["top"], seconds / million
    )  # fmt: skip
    begun = time.perf_counter()
    centres = prototypes(pool, CLUSTERS)
    seconds = time.perf_counter() - begun
    path = str(write_scores(pool, "prototypes", centres.scores, {}).path)
    found["prototypes"] = path, ["top", "bottom"], seconds / million
    halves = random_scores(Random(store=Path(pool.prefix), name="halves")).facts["scores"]
    begun = time.perf_counter()
    for name, side in (("a", "top"), ("b", "bottom")):
        run(folder, name, 100, steps, {"scores": halves, "keep": 0.5, "side": side})
    training = time.perf_counter() - begun
    cpu = torch.device("cpu")
    scorers = [open_scorer(folder / name, None, cpu, "fp32") for name in ("a", "b")]
    values, seconds = losses_of_strangers(scorers, pool, 8192)
    path = str(write_scores(pool, "perplexity", values, {"training_s": training}).path)
    found["perplexity"] = path, ["bottom", "middle", "top"], seconds / million
    return found


def kept_shares(
    path: str, side: str, pool: TokenStore, kinds: NDArray[np.int64]
) -> dict[str, float]:
    """The share of each kind in the tokens that are kept."""
    _, documents = kept_documents(np.load(path), pool.lengths, KEEP, side)
    sums = np.bincount(kinds[documents], pool.lengths[documents], len(KINDS))
    return dict(zip(KINDS, (sums / sums.sum()).round(4).tolist(), strict=True))


def interval(values: list[float]) -> list[float]:
    """Mean and half of the 95 % interval of Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [round(float(np.mean(values)), 4), round(float(half), 4)]


def compared(folder: Path, made: Path | None, seeds: int, steps: int) -> dict[str, Any]:
    pool, kinds, target = write_pool(folder, made or prepared(folder))
    scorers = score(folder, pool, target, steps)
    oracle = str(write_scores(pool, "oracle", np.where(kinds == 0, 1.0, 0.0), {}).path)
    ways = [("oracle", oracle, "top", 0.0)]
    ways += [
        (f"{n} {s}", path, s, cost) for n, (path, sides, cost) in scorers.items() for s in sides
    ]
    losses: dict[str, list[float]] = {"random": []} | {name: [] for name, *_ in ways}
    for seed in range(seeds):
        asked = Random(store=Path(pool.prefix), name=f"random{seed}", seed=seed)
        luck = random_scores(asked).facts["scores"]
        for name, path, side, _ in (("random", luck, "top", 0.0), *ways):
            select = {"scores": path, "keep": KEEP, "side": side}
            at = f"{name.replace(' ', '-')}-{seed}"
            losses[name].append(run(folder, at, seed, steps, select))
            shutil.rmtree(folder / at)
            print(f"seed {seed}  {name:<18} {losses[name][-1]:.4f}", flush=True)
    rows = {}
    for name, path, side, cost in (("random", luck, "top", 0.0), *ways):
        less = [one - other for one, other in zip(losses[name], losses["random"], strict=True)]
        rows[name] = {
            "losses": losses[name],
            "loss": interval(losses[name]),
            "against_random": [0.0, 0.0] if name == "random" else interval(less),
            "kept": kept_shares(path, side, pool, kinds),
            "scoring_s_per_million_tokens": round(cost, 3),
        }
    return {
        "pool": {"documents": pool.num_documents, "tokens": pool.num_tokens, "keep": KEEP},
        "kinds": dict(zip(KINDS, SHARES, strict=True)),
        "examples": len(target.examples),
        "tokens_trained": steps * SEQUENCES * LENGTH,
        "seeds": seeds,
        "methods": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prepared", type=Path, help="token files of both built-in corpora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = compared(Path(folder), given.prepared, given.seeds, given.steps)
    found |= {
        "seconds": round(time.perf_counter() - begun),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for name, row in found["methods"].items():
        (loss, half), (less, by) = row["loss"], row["against_random"]
        print(f"{name:<20} {loss:.4f} ± {half:.4f}   {less:+.4f} ± {by:.4f}   {row['kept']}")
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
