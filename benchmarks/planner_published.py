"""Calibrate the planner on half of the published large runs and test it on the other half.

    python benchmarks/planner_published.py [--json OUT]

Throughput published by the authors of other frameworks: Llama 3 405B (arXiv 2407.21783, table 4),
torchtitan (its table of December 2024: H100 of 96 GB with 2.4 TB/s, limited to 500 W), DeepSeek-V3
(180K GPU-hours for a trillion tokens, arXiv 2412.19437) and Frontier (arXiv 2312.12705). Details
missing from a publication are assumed, as comments state. Starting from the constants known without
any measurement, ``adapt`` is fitted to every second row and predicts the others, and vice versa.
Each row is predicted once, but rows of the same source are among the fitted rows. The error of
throughput equals the error of MFU.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from allometry.configs.machine import load_hardware
from allometry.launch.text import table
from allometry.scaling.planner.calibrate import Calibration, adapt, predict
from allometry.scaling.planner.cases import Cases

GOALS = {"median": 0.15, "tau": 0.6}
LLAMA = {"vocab": 128256, "kv_heads": 8, "head_dim": 128, "eager": 0}
B8 = LLAMA | {"layers": 32, "width": 4096, "heads": 32, "ffn": 14336}
B70 = LLAMA | {"layers": 80, "width": 8192, "heads": 64, "ffn": 28672}
B405 = LLAMA | {"layers": 126, "width": 16384, "heads": 128, "ffn": 53248}
DEEPSEEK = {
    **{"layers": 61, "width": 7168, "heads": 128, "kv_heads": 128, "head_dim": 192, "ffn": 18432},
    **{"vocab": 129280, "experts": 256, "top_k": 8, "expert_ffn": 2048, "shared_experts": 1},
    **{"dense_layers": 3, "q_rank": 1536, "kv_rank": 512, "eager": 0},
}
GPT = {"vocab": 51200, "gated": 0, "tied": 1, "eager": 1, "even_stages": 1, "sequence": 2048}
B175 = GPT | {"layers": 96, "width": 12288, "heads": 96, "kv_heads": 96, "head_dim": 128}
T1 = GPT | {"layers": 128, "width": 25600, "heads": 128, "kv_heads": 128, "head_dim": 200}
TITAN = {"hardware": "h100 titan", "sequence": 8192, "zero": 3}
LONG = B8 | TITAN | {"micro_batch": 1, "precision": "fp8", "recompute": "full"}


@dataclass(frozen=True)
class Run:
    """Row of ``Cases`` with its tokens/s per GPU."""

    name: str
    row: dict[str, Any]
    tokens_per_second: float


def flops_of(row: dict[str, Any]) -> float:
    """Return the FLOPs of a token: 6 per active parameter, and causal attention's half."""
    h, layers, inner = row["width"], row["layers"], row["heads"] * row["head_dim"]
    visits = row.get("top_k", 0) + row.get("shared_experts", 0)
    dense = row["dense_layers"] if visits else layers
    ffn = dense * row["ffn"] + (layers - dense) * visits * row.get("expert_ffn", 0)
    attention = h * (2 * inner + 2 * row["kv_heads"] * row["head_dim"])
    if "kv_rank" in row:  # latent attention; 128 of a head's 192 dimensions are its value
        q, kv = row["q_rank"], row["kv_rank"]
        attention = h * (q + kv + 64) + q * inner + 4 / 3 * kv * inner + 2 / 3 * inner * h
    used = layers * attention + (2 + row.get("gated", 1)) * h * ffn + row["vocab"] * h
    return float(6 * used + 6 * layers * inner * row["sequence"])


def of_flops(rate: float, row: dict[str, Any]) -> float:
    """Return tokens/s per GPU from FLOP/s."""
    return rate / flops_of(row)


def runs() -> list[Run]:
    """Return the published runs whose layout is sufficiently described."""
    found = []
    llama = B405 | {"hardware": "h100", "tp": 8, "pp": 16, "zero": 2, "micro_batch": 1}
    llama |= {"chunks": 8, "schedule": "interleaved"}  # one layer per chunk: its section 3.3
    for name, more, tflops in (
        ("8K, 8192 GPUs", {"dp": 64, "sequence": 8192, "global_batch": 2048}, 430),
        ("8K, 16384 GPUs", {"dp": 128, "sequence": 8192, "global_batch": 2048}, 400),
        ("131K, cp16", {"dp": 8, "cp": 16, "sequence": 131072, "global_batch": 128}, 380),
    ):
        row = llama | more
        found.append(Run(f"Llama 405B {name}", row, of_flops(tflops * 1e12, row)))
    small = B8 | TITAN | {"dp": 8, "micro_batch": 2, "global_batch": 16}
    small |= {"recompute": "selective", "repeats": 1}
    for name, more, rate in (
        ("eager", {"eager": 1}, 5762),
        ("compiled", {}, 6667),
        ("fp8", {"precision": "fp8"}, 8532),
    ):
        found.append(Run(f"titan 8B {name}", small | more, rate))
    for cp, rate in ((1, 3890), (2, 2540), (4, 1071), (8, 548)):
        more = {"cp": cp, "dp": 8 // cp, "sequence": 32768 * cp, "global_batch": 8 // cp}
        found.append(Run(f"titan 8B cp{cp}", LONG | more, rate))
    wide = B70 | TITAN | {"tp": 8, "dp": 32, "micro_batch": 16, "global_batch": 512}
    found.append(Run("titan 70B", wide | {"precision": "fp8", "recompute": "full"}, 829))
    deep = B405 | TITAN | {"tp": 8, "pp": 8, "dp": 8, "global_batch": 256, "zero": 2}
    deep |= {"precision": "fp8", "recompute": "full", "micro_batch": 4}  # 8 chunks, the default
    found.append(Run("titan 405B 1F1B", deep, 100))
    twice = {"schedule": "interleaved", "chunks": 2}
    found.append(Run("titan 405B interleaved", deep | twice, 128))
    # 16 sequences per micro-batch, the number in a step of 15,360; ZBV is used for DualPipe's
    # bubble (assumed). Its all-to-all overlaps with computation, each token on at most 4 nodes
    # (3.2).
    v3 = DEEPSEEK | {"hardware": "h800", "pp": 16, "ep": 64, "dp": 128, "precision": "fp8"}
    v3 |= {"experts_beside": 1, "nodes_of_token": 4}
    v3 |= {"sequence": 4096, "micro_batch": 1, "global_batch": 15360, "schedule": "zbv"}
    found.append(Run("DeepSeek-V3", v3 | {"chunks": 2, "recompute": "selective"}, 1543))
    frontier = {"hardware": "mi250x", "micro_batch": 1, "zero": 1, "recompute": "full"}
    for name, model, layout, tflops in (
        # degree of data parallelism as in the paper's largest runs (assumed)
        ("175B", B175, {"tp": 4, "pp": 16, "dp": 16, "global_batch": 640 * 16}, 69.2),
        ("1T", T1, {"tp": 8, "pp": 64, "dp": 6, "global_batch": 1600 * 6}, 61.2),
    ):
        row = model | frontier | layout | {"ffn": 4 * model["width"]}
        found.append(Run(f"Frontier {name}", row, of_flops(tflops * 1e12, row)))
    return found


def judged(found: list[Run]) -> np.ndarray:
    """Return the predicted tokens/s of each row, with constants adapted to the other half."""
    h100 = load_hardware("h100")
    slower = (500 / h100.gpu.power_w) ** 0.5  # at its power limit, as in configs/hardware/b300.yaml
    gpu = h100.gpu.model_copy(
        update={
            **{"memory_bytes": 9.6e10, "memory_bandwidth": 2.4e12, "power_w": 500},
            "attainable": {key: slower * share for key, share in h100.gpu.attainable.items()},
            "attention": slower * h100.gpu.attention,
        }
    )
    slow = h100.inside.model_copy(update={"bandwidth": 2e11})  # 400 GB/s in both directions
    hardware = {
        **{"h100": h100, "mi250x": load_hardware("mi250x")},
        "h100 titan": h100.model_copy(update={"gpu": gpu}),
        "h800": h100.model_copy(update={"inside": slow}),
    }
    cases = Cases.of([run.row for run in found], hardware)
    rates = np.array([run.tokens_per_second for run in found])
    seconds = cases.step_tokens / (rates * cases.gpus)
    predicted = np.zeros(len(found))
    order = np.arange(len(found))
    for half in (order % 2 == 0, order % 2 == 1):
        belief = adapt(Calibration.before(), cases.take(half), seconds[half])
        predicted[~half] = predict(belief, cases.take(~half)).seconds
    return np.asarray(cases.step_tokens / (predicted * cases.gpus))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = runs()
    predicted = judged(found)
    real = np.array([run.tokens_per_second for run in found])
    error = predicted / real - 1
    flops = np.array([flops_of(run.row) for run in found])
    rows = [["run", "published tok/s/GPU", "predicted", "error"]]
    for run, said, off in zip(found, predicted, error, strict=True):
        rows.append([run.name, f"{run.tokens_per_second:,.0f}", f"{said:,.0f}", f"{off:+.1%}"])
    result = {
        "goals": GOALS,
        "median": float(np.median(np.abs(error))),
        "tau": float(kendalltau(predicted * flops, real * flops).statistic),
        "tau_of_tokens": float(kendalltau(predicted, real).statistic),
        "rows": {run.name: float(off) for run, off in zip(found, error, strict=True)},
    }
    print(table(rows, right=(1, 2, 3)))
    print(
        f"median error {result['median']:.1%}; Kendall's tau of FLOP/s {result['tau']:.2f}, of "
        f"tokens/s {result['tau_of_tokens']:.2f}"
    )
    if asked.json is not None:
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
