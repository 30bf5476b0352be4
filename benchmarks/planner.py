"""What the planner's cost model is worth on published measurements that it was not fitted on.

    python benchmarks/planner.py --data DIR/calibration.csv.gz [--json OUT]

Each source is left out in turn: constants are calibrated on the others, and the error of
throughput, the order of layouts and the coverage of intervals are those of the source left out.
Then three of its runs are added. Once without runs that some fault made slow (pipelines below 5 %
MFU in one source), once with all rows. Uses one thread.

The formulas and the defaults that a calibration starts from were made by people who had seen all
of the table: only the fit is blind to the source left out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from allometry.configs.machine import known_hardware, load_hardware
from allometry.launch.text import table
from allometry.scaling.planner.belief import Calibration, adapt, choose_runs, predict
from allometry.scaling.planner.calibrate import calibrate
from allometry.scaling.planner.cases import Cases

NAMES = {
    **{"layers": "L", "width": "h", "heads": "heads", "kv_heads": "kv_heads", "ffn": "ffn"},
    **{"head_dim": "head_dim", "vocab": "vocab", "gated": "gated", "tied": "tied"},
    **{"experts": "n_exp", "top_k": "topk", "expert_ffn": "moe_ffn", "shared_experts": "n_shared"},
    **{"dense_layers": "n_dense", "q_rank": "q_lora", "kv_rank": "kv_lora", "sequence": "seq"},
    **{"micro_batch": "mbs", "global_batch": "gbs", "tp": "tp", "pp": "pp", "chunks": "vpp"},
    **{"cp": "cp", "ep": "ep", "dp": "dp", "zero": "zero", "sequence_parallel": "sp"},
    **{"flash": "flash", "overlap": "overlap"},
}
# What is known of a framework: kernels launched one by one from Python, layers split evenly,
# experts' products launched one by one, FlashAttention-2 (on an H200 at 0.6 of cuDNN's rate:
# measured, 288 of 477 TFLOP/s).
FRAMEWORKS: dict[str, dict[str, Any]] = {
    "nanotron": {"eager": 1, "even_stages": 0, "attention_rate": 0.6},
    "megatron-ds22": {"eager": 1, "even_stages": 1},
    "megatron": {"eager": 0, "even_stages": 0, "grouped": 0},
    "megatron-nv22": {"eager": 0, "even_stages": 1},
}
PRECISIONS = {"mxfp8": "fp8", "nvfp4": "fp4"}
FAULTY_MFU = 5.0
NODES, TOP, DRAWS, SMALLEST_GROUP = 16, 5, 20, 5
BLIND = "the fit alone; formulas and default constants were made with all sources in view"
GOALS = {"median": 0.10, "p90": 0.35, "tau": 0.6, "regret": 0.05, "coverage": 0.85, "three": 0.06}


@dataclass(frozen=True)
class Measured:
    """Configurations with the seconds of a step, (C,); ``faulty``: what the filter takes out."""

    cases: Cases
    seconds: np.ndarray
    source: np.ndarray
    group: np.ndarray
    faulty: np.ndarray
    left_out: int

    def take(self, chosen: np.ndarray) -> Measured:
        columns = (self.seconds, self.source, self.group, self.faulty)
        return Measured(self.cases.take(chosen), *(c[chosen] for c in columns), self.left_out)


def read(path: Path) -> Measured:
    """The table's rows that have a shape and a rate; how many have not is counted."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["L"] and row["tok_s_gpu"]]
    cases = Cases.of([_case(row) for row in rows], {k: load_hardware(k) for k in known_hardware()})
    rates = np.array([float(row["tok_s_gpu"]) for row in rows])
    return Measured(
        cases,
        cases.step_tokens / (rates * cases.gpus),
        np.array([row["source"] for row in rows]),
        np.array([f"{row['model']} {row['gpu']} {row['gpus']}" for row in rows]),
        np.array([_faulty(row) for row in rows]),
        len(every) - len(rows),
    )


def _case(row: dict[str, str]) -> dict[str, Any]:
    case: dict[str, Any] = {
        ours: float(row[theirs]) for ours, theirs in NAMES.items() if row[theirs]
    }
    return {
        **case,
        **FRAMEWORKS[row["framework"]],
        "hardware": row["gpu"].lower(),
        "precision": PRECISIONS.get(row["precision"], row["precision"]),
        "recompute": "none" if row["recompute"] == "recipe" else row["recompute"],
        "schedule": "interleaved" if case["chunks"] > 1 else "1f1b",
    }


def _faulty(row: dict[str, str]) -> bool:
    found = re.search(r"\bMFU=([\d.]+)", row["note"])
    return found is not None and int(row["pp"]) > 1 and float(found[1]) < FAULTY_MFU


def errors(seconds: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Relative errors of throughput."""
    error = np.abs(seconds / predicted - 1)
    bias = np.median(np.log(predicted / seconds))
    quantiles = {"median": np.median(error), "p90": np.quantile(error, 0.9), "bias": bias}
    return {"rows": len(error), **{key: float(value) for key, value in quantiles.items()}}


def ranking(measured: Measured, predicted: np.ndarray) -> dict[str, float] | None:
    """Kendall's tau, and what the best of the five layouts predicted fastest loses, by group."""
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
    """Errors of the other runs once these are known."""
    own = adapt(belief, held.cases.take(chosen), held.seconds[chosen])
    rest = np.setdiff1d(np.arange(len(held.seconds)), chosen)
    predicted = predict(own, held.cases.take(rest)).seconds
    return errors(held.seconds[rest], predicted)


def leave_out(measured: Measured, source: str, seed: int) -> dict[str, Any]:
    held, rest = (
        measured.take(mask) for mask in (measured.source == source, measured.source != source)
    )
    belief = calibrate(rest.cases, rest.seconds, rest.source)
    said = predict(belief, held.cases)
    inside = (said.low <= held.seconds) & (held.seconds <= said.high)
    generator = np.random.default_rng(seed)
    draws = [
        after(belief, held, generator.choice(len(held.seconds), 3, replace=False))["median"]
        for _ in range(DRAWS)
    ]
    chosen = np.array(choose_runs(belief, held.cases, 3))
    seen = ~said.unseen
    return {
        "source": source,
        **errors(held.seconds, said.seconds),
        "seen_kinds": errors(held.seconds[seen], said.seconds[seen]) if seen.any() else None,
        "coverage": float(inside.mean()),
        "width": float(np.median(np.log(said.high / said.low)) / 2),
        "ranking": ranking(held, said.seconds),
        "three_chosen": after(belief, held, chosen)["median"],
        "three_random": float(np.median(draws)),
        "log_errors": np.log(said.seconds / held.seconds).round(4).tolist(),
    }


def in_sample(measured: Measured) -> list[dict[str, Any]]:
    """Errors with each source's own constants: what the formulas can at best."""
    belief = calibrate(measured.cases, measured.seconds, measured.source)
    found = []
    for source, constants in belief.of_source.items():
        mine = measured.take(measured.source == source)
        own = predict(Calibration(constants, belief.covariance), mine.cases).seconds
        row = {"source": source, **errors(mine.seconds, own), "ranking": ranking(mine, own)}
        found.append(row | {"constants": vars(constants)})
    return found


def pooled(folds: list[dict[str, Any]]) -> dict[str, float]:
    logs = np.concatenate([fold.pop("log_errors") for fold in folds])
    rows = [fold["rows"] for fold in folds]
    cover = np.average([fold["coverage"] for fold in folds], weights=rows)
    return errors(np.exp(-logs), np.ones(len(logs))) | {"coverage": float(cover)}


def shown(folds: list[dict[str, Any]], whole: dict[str, float], own: list[dict[str, Any]]) -> str:
    header = ["source left out", "rows", "median", "p90", "bias of log time", "seen kinds", "tau"]
    lines = [[*header, "regret", "coverage", "3 runs: chosen", "random", "own constants"]]
    for fold, mine in zip(folds, own, strict=True):
        rank, seen = fold["ranking"], fold["seen_kinds"]
        lines.append(
            [
                *(fold["source"], str(fold["rows"]), f"{fold['median']:.1%}", f"{fold['p90']:.1%}"),
                f"{fold['bias']:+.3f}",
                f"{seen['median']:.1%} of {seen['rows']}" if seen else "none",
                f"{rank['tau']:.2f}" if rank else "-",
                f"{rank['regret']:.1%}" if rank else "-",
                *(f"{fold[k]:.1%}" for k in ("coverage", "three_chosen", "three_random")),
                f"{mine['median']:.1%}",
            ]
        )
    last = ["all", str(whole["rows"]), f"{whole['median']:.1%}", f"{whole['p90']:.1%}"]
    lines.append(
        [*last, f"{whole['bias']:+.3f}", "", "", "", f"{whole['coverage']:.1%}", "", "", ""]
    )
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    measured = read(asked.data)
    result: dict[str, Any] = {
        "blind": BLIND,
        "goals": GOALS,
        "rows_without_shape_or_rate": measured.left_out,
    }
    for name, rows in (("filtered", measured.take(~measured.faulty)), ("all rows", measured)):
        folds = [leave_out(rows, str(s), 0) for s in np.unique(rows.source)]
        own, whole = in_sample(rows), pooled(folds)
        print(f"{name}:\n{shown(folds, whole, own)}\n", flush=True)
        result[name] = {"left_out": folds, "pooled": whole, "own_constants": own}
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
