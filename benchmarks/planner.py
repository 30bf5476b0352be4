"""Test the planner's cost model on published measurements that were left out of its calibration.

    python benchmarks/planner.py --data DIR/calibration.csv.gz [--json OUT]
    python benchmarks/planner.py --data DIR/calibration.csv.gz --json OUT --only slower  # one table
    python benchmarks/planner.py --data DIR/calibration.csv.gz --belief published.json

Each source is left out in turn: constants are calibrated on the other sources; the error of
throughput, the ranking of layouts and the coverage of intervals are computed on the source left
out. Then one, two and three runs of that source are added, chosen over all cards and for each card
alone, and many random triples; the best of the random draws is known in hindsight only. To separate
a constant offset from the error, the median error is also subtracted. The spread between equal
configurations is a lower bound for any model of a layout. There are three tables: without runs that
other runs of their source prove to be slow by a fault (``planner.faults``: no model is used),
without pipelines below 5 % MFU in the one source that reports MFU, and with all rows. Uses one
thread.

The formulas and the initial defaults of the calibration were made by people who had seen the full
table: only the fit is blind to the source left out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from allometry.configs.machine import known_hardware, load_hardware
from allometry.launch.text import table
from allometry.scaling.planner.calibrate import (
    Calibration,
    adapt,
    choose_runs,
    logs_of,
    predict,
)
from allometry.scaling.planner.calibrate import errors as log_errors
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.constants import Constants
from allometry.scaling.planner.faults import SLOW, slowness
from allometry.scaling.planner.fit import calibrate
from allometry.scaling.planner.store import save
from allometry.trainer.record.writer import commit

NAMES = {
    **{"layers": "L", "width": "h", "heads": "heads", "kv_heads": "kv_heads", "ffn": "ffn"},
    **{"head_dim": "head_dim", "vocab": "vocab", "gated": "gated", "tied": "tied"},
    **{"experts": "n_exp", "top_k": "topk", "expert_ffn": "moe_ffn", "shared_experts": "n_shared"},
    **{"dense_layers": "n_dense", "q_rank": "q_lora", "kv_rank": "kv_lora", "sequence": "seq"},
    **{"micro_batch": "mbs", "global_batch": "gbs", "tp": "tp", "pp": "pp", "chunks": "vpp"},
    **{"cp": "cp", "ep": "ep", "dp": "dp", "zero": "zero", "sequence_parallel": "sp"},
    **{"flash": "flash", "overlap": "overlap"},
}
# Known properties of frameworks: kernels launched one by one from Python, layers divided evenly,
# expert products launched one by one, FlashAttention-2 (on an H200 at 0.6 of cuDNN's rate:
# measured, 288 of 477 TFLOP/s). Megatron-Bridge's recipes overlap the communication of tensor
# parallelism with products (``tp_comm_overlap``), except for nvfp4.
FRAMEWORKS: dict[str, dict[str, Any]] = {
    "nanotron": {"eager": 1, "even_stages": 0, "attention_rate": 0.6},
    "megatron-ds22": {"eager": 1, "even_stages": 1},
    "megatron": {"eager": 0, "even_stages": 0, "grouped": 0},
    "megatron-nv22": {"eager": 0, "even_stages": 1},
}
PRECISIONS = {"mxfp8": "fp8", "nvfp4": "fp4"}
LOW_MFU = 5.0
NODES, TOP, DRAWS, SMALLEST_GROUP = 16, 5, 12, 5
BLIND = "the fit alone; formulas and default constants were made with all sources in view"
GOALS = {"median": 0.10, "p90": 0.35, "tau": 0.6, "regret": 0.05, "coverage": 0.85, "three": 0.06}


@dataclass(frozen=True)
class Measured:
    """Configurations with measured seconds of a step, (C,).

    ``slow``: proved slow by the times of neighbouring configurations; ``low``: a pipeline below 5 %
    MFU.
    """

    cases: Cases
    seconds: np.ndarray
    source: np.ndarray
    group: np.ndarray
    slow: np.ndarray
    low: np.ndarray
    left_out: int

    def take(self, chosen: np.ndarray) -> Measured:
        columns = (self.seconds, self.source, self.group, self.slow, self.low)
        return Measured(self.cases.take(chosen), *(c[chosen] for c in columns), self.left_out)


def read(path: Path) -> Measured:
    """Read the rows of the table with a shape and a rate, and print the number of other rows."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["L"] and row["tok_s_gpu"]]
    cases = Cases.of([_case(row) for row in rows], {k: load_hardware(k) for k in known_hardware()})
    rates = np.array([float(row["tok_s_gpu"]) for row in rows])
    seconds = cases.step_tokens / (rates * cases.gpus)
    sources = np.array([row["source"] for row in rows])
    return Measured(
        cases,
        seconds,
        sources,
        np.array([f"{row['model']} {row['gpu']} {row['gpus']}" for row in rows]),
        slowness(cases, seconds, sources),
        np.array([_low(row) for row in rows]),
        len(every) - len(rows),
    )


def _case(row: dict[str, str]) -> dict[str, Any]:
    case: dict[str, Any] = {
        ours: float(row[theirs]) for ours, theirs in NAMES.items() if row[theirs]
    }
    if row["framework"] == "megatron" and row["precision"] != "nvfp4":
        case["tensor_chunks"] = case["tp"]
    return {
        **case,
        **FRAMEWORKS[row["framework"]],
        "hardware": row["gpu"].lower(),
        "precision": PRECISIONS.get(row["precision"], row["precision"]),
        "recompute": "none" if row["recompute"] == "recipe" else row["recompute"],
        "schedule": "interleaved" if case["chunks"] > 1 else "1f1b",
    }


def _low(row: dict[str, str]) -> bool:
    found = re.search(r"\bMFU=([\d.]+)", row["note"])
    return found is not None and int(row["pp"]) > 1 and float(found[1]) < LOW_MFU


def errors(seconds: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return relative errors of throughput."""
    error = np.abs(seconds / predicted - 1)
    bias = np.median(np.log(predicted / seconds))
    quantiles = {"median": np.median(error), "p90": np.quantile(error, 0.9), "bias": bias}
    return {"rows": len(error), **{key: float(value) for key, value in quantiles.items()}}


def ranking(measured: Measured, predicted: np.ndarray) -> dict[str, float] | None:
    """Return Kendall's tau and the loss by choosing the best of the five fastest predictions."""
    taus, regrets = [], []
    near = measured.cases.gpus <= NODES * np.minimum(measured.cases.hw["gpus_per_node"], 8)
    for name in np.unique(measured.group[near]):
        mine = (measured.group == name) & near
        if mine.sum() < SMALLEST_GROUP:
            continue
        ours = predicted[mine] / measured.cases.step_tokens[mine]
        truth = measured.seconds[mine] / measured.cases.step_tokens[mine]
        if len(np.unique(ours)) > 1:
            taus.append(float(kendalltau(ours, truth).statistic))
        regrets.append(1 - truth.min() / truth[np.argsort(ours, kind="stable")[:TOP]].min())
    if not taus:
        return None
    return {"groups": len(regrets), "tau": float(np.median(taus)), "worst_tau": min(taus)} | {
        "regret": float(np.median(regrets)),
        "worst_regret": float(max(regrets)),
    }


def after(belief: Calibration, held: Measured, chosen: np.ndarray) -> dict[str, float]:
    """Return the errors on the other runs after adapting to the chosen runs."""
    own = adapt(belief, held.cases.take(chosen), held.seconds[chosen])
    rest = np.setdiff1d(np.arange(len(held.seconds)), chosen)
    logs = own_errors(own, held.cases.take(rest), held.seconds[rest])
    return errors(np.exp(-logs), np.ones(len(rest)))


def best_runs(belief: Calibration, held: Measured, count: int) -> np.ndarray:
    """Return the ``count`` most informative runs on few GPUs."""
    small = np.flatnonzero(held.cases.gpus <= np.median(held.cases.gpus))
    return small[choose_runs(belief, held.cases.take(small), count)]


def after_random(belief: Calibration, held: Measured, seed: int) -> dict[str, float]:
    """Return median errors after adapting to three random runs: of the median and the best draw."""
    generator, count = np.random.default_rng(seed), len(held.seconds)
    draws = [
        after(belief, held, generator.choice(count, 3, replace=False))["median"]
        for _ in range(DRAWS)
    ]
    return {"draws": DRAWS, "median": float(np.median(draws)), "best": min(draws)}


def of_cards(belief: Calibration, held: Measured) -> dict[str, dict[str, float]]:
    """Return errors before and after adapting to three runs of one card, by card."""
    found = {}
    for card in np.unique(held.cases.hardware):
        mine = held.take(held.cases.hardware == card)
        before = errors(mine.seconds, predict(belief, mine.cases).seconds)["median"]
        found[str(card)] = {"before": before, **after(belief, mine, best_runs(belief, mine, 3))}
    return found


def repeated(measured: Measured) -> dict[str, float] | None:
    """Return the spread of runs of one configuration, a lower bound for the error of any model."""
    cases = measured.cases
    names = np.stack([cases.hardware, cases.precision, cases.recompute, cases.schedule], axis=1)
    numbers = np.stack(list(cases.n.values()), axis=1)
    keys = ["|".join(map(str, (*a, *b))) for a, b in zip(names, numbers, strict=True)]
    _, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    middle = np.array([np.median(measured.seconds[index == i]) for i in range(len(counts))])
    twins = counts[index] > 1
    if not twins.any():
        return None
    return errors(measured.seconds[twins], middle[index][twins])


def own_errors(belief: Calibration, cases: Cases, seconds: np.ndarray) -> np.ndarray:
    """Return log(predicted / measured seconds)."""
    return log_errors(cases, logs_of(belief.mean, cases), np.log(seconds))


def leave_out(measured: Measured, source: str, seed: int) -> dict[str, Any]:
    held, rest = (
        measured.take(mask) for mask in (measured.source == source, measured.source != source)
    )
    belief = calibrate(rest.cases, rest.seconds, rest.source)
    said = predict(belief, held.cases)
    inside = (said.low <= held.seconds) & (held.seconds <= said.high)
    logs = np.log(said.seconds / held.seconds)
    centred = errors(np.exp(np.median(logs) - logs), np.ones(len(logs)))
    seen = ~said.unseen
    chosen = best_runs(belief, held, 3)
    return {
        "source": source,
        **errors(held.seconds, said.seconds),
        "seen_kinds": errors(held.seconds[seen], said.seconds[seen]) if seen.any() else None,
        "coverage": float(inside.mean()),
        "width": float(np.median(np.log(said.high / said.low)) / 2),
        "ranking": ranking(held, said.seconds),
        "without_its_offset": {k: centred[k] for k in ("median", "p90")},
        "chosen": [after(belief, held, chosen[:count]) for count in (1, 2, 3)],
        "three_random": after_random(belief, held, seed),
        "three_of_a_card": of_cards(belief, held),
        "repeated": repeated(held),
        "log_errors": logs.round(4).tolist(),
    }


def in_sample(measured: Measured) -> list[dict[str, Any]]:
    """Return errors with constants fitted to each source itself, the limit of the formulas."""
    belief = calibrate(measured.cases, measured.seconds, measured.source)
    found = []
    for source in belief.own:
        mine = measured.take(measured.source == source)
        own = belief.of_source(source)
        said = predict(own, mine.cases).seconds
        row = {"source": source, **errors(mine.seconds, said), "ranking": ranking(mine, said)}
        names = Constants.names()
        found.append(
            row
            | {"constants": dict(zip(names, np.exp(own.mean[: len(names)]).tolist(), strict=True))}
        )
    return found


def pooled(folds: list[dict[str, Any]]) -> dict[str, float]:
    logs = np.concatenate([fold.pop("log_errors") for fold in folds])
    rows = [fold["rows"] for fold in folds]
    cover = np.average([fold["coverage"] for fold in folds], weights=rows)
    return errors(np.exp(-logs), np.ones(len(logs))) | {"coverage": float(cover)}


def shown(folds: list[dict[str, Any]], whole: dict[str, float], own: list[dict[str, Any]]) -> str:
    header = ["source left out", "rows", "median", "p90", "bias", "without it", "tau", "regret"]
    lines = [[*header, "coverage", "1 run", "2", "3", "p90", "random", "best", "own constants"]]
    for fold, mine in zip(folds, own, strict=True):
        rank = fold["ranking"]
        lines.append(
            [
                *(fold["source"], str(fold["rows"]), f"{fold['median']:.1%}", f"{fold['p90']:.1%}"),
                *(f"{fold['bias']:+.3f}", f"{fold['without_its_offset']['median']:.1%}"),
                f"{rank['tau']:.2f}" if rank else "-",
                f"{rank['regret']:.1%}" if rank else "-",
                f"{fold['coverage']:.1%}",
                *(f"{each['median']:.1%}" for each in fold["chosen"]),
                f"{fold['chosen'][-1]['p90']:.1%}",
                *(f"{fold['three_random'][key]:.1%}" for key in ("median", "best")),
                f"{mine['median']:.1%}",
            ]
        )
    last = ["all", str(whole["rows"]), f"{whole['median']:.1%}", f"{whole['p90']:.1%}"]
    last += [f"{whole['bias']:+.3f}", "", "", "", f"{whole['coverage']:.1%}"]
    lines.append([*last, *[""] * (len(lines[0]) - len(last))])
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="the tables with this in their name")
    parser.add_argument("--belief", type=Path, help="only fit all sources and write this file")
    asked = parser.parse_args()
    measured = read(asked.data)
    if asked.belief is not None:
        rows = measured.take(measured.slow <= SLOW)
        save(calibrate(rows.cases, rows.seconds, rows.source), asked.belief)
        return
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/planner.py --data {asked.data.name} --json ...",
        "commit": commit(),
        "machine": f"{os.cpu_count()} CPU cores, one thread",
        "blind": BLIND,
        "goals": GOALS,
        "rows_without_shape_or_rate": measured.left_out,
    }
    if asked.json is not None and asked.json.exists() and asked.only:
        result = json.loads(asked.json.read_text(encoding="utf-8")) | result
    for name, kept in (
        (f"without runs {SLOW} times slower than possible", measured.slow <= SLOW),
        ("without pipelines below 5 % MFU", ~measured.low),
        ("all rows", measured.slow > 0),
    ):
        if asked.only not in name:
            continue
        rows = measured.take(kept)
        folds = [leave_out(rows, str(s), 0) for s in np.unique(rows.source)]
        own, whole = in_sample(rows), pooled(folds)
        print(f"{name}:\n{shown(folds, whole, own)}\n", flush=True)
        result[name] = {"left_out": folds, "pooled": whole, "own_constants": own}
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
