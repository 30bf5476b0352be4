"""Compare update rules: final loss, bytes of state, seconds of a step, division over ranks.

    python benchmarks/optimizers.py [--quick] [--only PART]... [--processes 2] [--work DIR]

Trains a byte model of 10.6M parameters on Python's library. The learning rate of each rule is tuned
in whole octaves with one seed; the best rate is then run with the other seeds, on equal tokens. The
loss of each trial is stored in --work when the trial ends, so that the same command continues after
an interruption. All timed steps, including torch's own optimizers, use the trainer's allocator.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders.machine import facts, source_bytes
from contenders.rules import Contender, contenders, model
from scipy import stats
from torch import nn

from allometry.launch.start import CHOICES, settle_allocator
from allometry.models.build import build_model, parameter_specs
from allometry.models.init import initialize
from allometry.optim.build import build_optimizer
from allometry.scaling.parameterization import Parameterization
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Trial
from allometry.studies.sweeps.runner import Runner
from allometry.studies.sweeps.transfer import TransferSweep
from allometry.studies.sweeps.trials import TrialLog
from allometry.studies.sweeps.workers import Workers

LENGTH, SEQUENCES, HELD_OUT = 128, 8, 128
PARTS = ("loss", "state", "step", "ranks")


def run_losses(given: argparse.Namespace) -> list[dict[str, Any]]:
    pool = source_bytes(given.steps * SEQUENCES * 2 + HELD_OUT, LENGTH)
    rows = []
    print("| rule | best rate | held-out loss, mean of seeds (95 %) |\n|---|---|---|")
    for contender in contenders(given.size):
        sweep = TransferSweep(
            model=model(given.size),
            parameterization=contender.parameterization,
            optimizer=contender.optimizer,
            pool_PL=pool[:-HELD_OUT],
            held_out_HL=pool[-HELD_OUT:],
            axis=Axis.WIDTH,
            steps=given.steps,
            sequences=SEQUENCES,
            warmup_steps=given.steps // 20,
        )
        log = TrialLog(given.work / f"loss-{contender.name}-{given.size}.jsonl", sweep.settings())
        row = _tuned(given, contender, sweep, log)
        rows.append(row)
        print(f"| {row['rule']} | {row['lr']:.3g} | {row['mean']:.4f} ± {row['half_95']:.4f} |")
        sys.stdout.flush()
    return rows


def _tuned(
    given: argparse.Namespace, contender: Contender, sweep: TransferSweep, log: TrialLog
) -> dict[str, Any]:
    width = sweep.model.width
    runner = Runner(
        sweep, contender.log2_lrs, 1.0, given.processes, known=dict(log.known), done=log.add
    )
    tuned = runner.run((width,), (0,)).sweep(width)
    best = tuned.log2_lrs[int(np.argmin(tuned.losses_RS[:, 0]))]
    trials = [Trial(width, best, seed) for seed in range(given.seeds)]
    missing = [trial for trial in trials if trial not in log.known]
    with Workers(given.processes) as workers:
        workers.run(sweep.loss, missing, log.add)
    losses = [log.known[trial] for trial in trials]
    error = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return {
        "rule": contender.name,
        "lr": 2.0**best,
        "tuning": [
            [rate, float(loss)]
            for rate, (loss,) in zip(tuned.log2_lrs, tuned.losses_RS, strict=True)
        ],
        "losses": losses,
        "mean": statistics.fmean(losses),
        "half_95": float(stats.t.ppf(0.975, max(1, len(losses) - 1))) * error,
        "tokens": given.steps * SEQUENCES * LENGTH,
    }


Made = tuple[nn.Module, Sequence[torch.optim.Optimizer]]


def ours(contender: Contender, size: str) -> Made:
    description = model(size)
    rules = Parameterization(contender.parameterization, description, contender.optimizer)
    made = build_model(description, rules, "fp32")
    initialize(made, rules, 0)
    config = contender.optimizer.model_copy(update={"lr": 2.0 ** contender.log2_lrs[1]})
    optimizer = build_optimizer(made.named_parameters(), parameter_specs(made), rules, config)
    return made, [optimizer]


def torch_adamw(size: str) -> Made:
    made, _ = ours(contenders(size)[0], size)
    return made, [torch.optim.AdamW(made.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)]


def torch_muon(size: str) -> Made:
    """Build torch's Muon for the parameters of our Muon, and its fused AdamW for the others."""
    made, _ = ours(contenders(size)[0], size)
    hidden, rest = [], []
    for name, parameter in made.named_parameters():
        (hidden if parameter.dim() == 2 and name.startswith("blocks.") else rest).append(parameter)
    return made, [
        torch.optim.Muon(hidden, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, fused=True),
    ]


def candidates(size: str) -> dict[str, Callable[[], Made]]:
    made: dict[str, Callable[[], Made]] = {"torch adamw": partial(torch_adamw, size)}
    if hasattr(torch.optim, "Muon"):
        made["torch muon"] = partial(torch_muon, size)
    else:
        print("this torch has no Muon: nothing is held against it")
    return made | {c.name: partial(ours, c, size) for c in contenders(size)}


def give_gradients(made: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)


def run_states(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print("\n| rule | bytes of state per parameter |\n|---|---|")
    for name, make in candidates(given.size).items():
        made, optimizers = make()
        give_gradients(made)
        for optimizer in optimizers:
            optimizer.step()
        size = sum(
            value.numel() * value.element_size()
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )
        number = sum(parameter.numel() for parameter in made.parameters())
        rows.append({"rule": name, "parameters": number, "bytes": size, "each": size / number})
        print(f"| {name} | {size / number:.3f} |")
    return rows


def run_steps(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Time steps with given gradients; rules alternate, and ratios are within a round."""
    torch.set_num_threads(given.threads)
    made = {name: make() for name, make in candidates(given.size).items()}
    for module, optimizers in made.values():
        give_gradients(module)
        for optimizer in optimizers:
            optimizer.step()  # allocates the states
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(given.repeats):
        for name in list(made) if turn % 2 else list(made)[::-1]:
            begun = time.perf_counter()
            for optimizer in made[name][1]:
                optimizer.step()
            seconds[name].append(time.perf_counter() - begun)
    print(
        f"\n| rule | ms ({given.threads} threads) | x torch adamw | x torch muon |\n"
        "|---|---|---|---|"
    )
    rows = []
    for name, own in seconds.items():
        row: dict[str, Any] = {"rule": name, "seconds": own, "median_s": statistics.median(own)}
        cells = []
        for rival in ("torch adamw", "torch muon"):
            ratios = [a / b for a, b in zip(own, seconds.get(rival, []), strict=False)]
            row[f"over {rival}"] = statistics.median(ratios) if ratios else None
            cells.append(f"{row[f'over {rival}']:.3f}" if ratios else "-")
        rows.append(row)
        print(f"| {name} | {1e3 * row['median_s']:.2f} | {' | '.join(cells)} |")
    return rows


def run_ranks(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Time MuonH's step and its Newton-Schulz part on 1, 2 and 4 ranks with one thread each."""
    rows = []
    print("\n| ranks | NS ms, slowest rank | its calls | step ms |\n|---|---|---|---|")
    for world in (1, 2) if given.quick else (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "ranks.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(world), "-m", "contenders.orthogonal"]
            command += ["--out", str(out), "--size", given.size, "--repeats", str(given.repeats)]
            done = subprocess.run(
                command,
                cwd=Path(__file__).resolve().parent,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{world} ranks failed:\n{done.stderr[-2000:]}")
            ranks = json.loads(out.read_text(encoding="utf-8"))
        slowest = max(ranks, key=lambda rank: rank["newton_schulz_s"])
        rows.append({"world": world, "ranks": ranks})
        step = max(rank["step_s"] for rank in ranks)
        print(
            f"| {world} | {1e3 * slowest['newton_schulz_s']:.2f} | {slowest['calls']} "
            f"| {1e3 * step:.2f} |"
        )
    cores = os.cpu_count() or 1
    if cores < 4:
        print(f"(with {cores} cores, 4 ranks share them: read the calls, not the time)")
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all works")
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the timed steps")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="of 1,024 tokens, in a loss run")
    parser.add_argument("--repeats", type=int, default=61, help="of timed steps")
    parser.add_argument("--allocator", choices=CHOICES, default="auto", help="of all contenders")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-optimizers"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.size = "tiny" if given.quick else "10m"
    if given.quick:
        given.seeds, given.steps, given.repeats = 2, 10, 3
    return given


def main() -> None:
    given = arguments()
    allocator = settle_allocator(given.allocator)
    given.work.mkdir(parents=True, exist_ok=True)
    parts = given.only or PARTS
    runs = {"loss": run_losses, "state": run_states, "step": run_steps, "ranks": run_ranks}
    result: dict[str, Any] = {**facts(), "quick": given.quick, "threads": given.threads}
    result["allocator"] = allocator
    for part in PARTS:
        if part in parts:
            result[part] = runs[part](given)
    path = given.json or Path(__file__).parent / "results" / (
        f"optimizers-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
