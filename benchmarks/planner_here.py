"""Compare the planner's predicted step times on this machine with measured ones.

    OMP_NUM_THREADS=1 allometry doctor --measure
    python benchmarks/planner_here.py --work FILE [--hardware this-machine] [--only NAME]
                                      [--show] [--json OUT]

About twenty small runs, dense and with experts, take steps with the trainer's step function
(without data loading and records) on one or two processes with one thread each. FILE receives one
line per finished run; the same command continues with the remaining runs. ``--show`` prints the
results of FILE without measuring.

To correct for other load, each process does the same fixed work before and after every few steps.
"scaled" seconds are wall-clock seconds divided by the ratio of wall-clock to CPU time of that work.
"cpu" seconds are the CPU seconds of the slower process and exclude the time that ranks wait for
each other. On a busy machine use "cpu" for runs on one process; on an idle machine use "scaled" for
all runs.

Predictions use the output of ``doctor --measure``, and the planner's default constants otherwise.
"left one out": constants adapted to all other runs on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from contenders.machine import facts
from scipy.stats import kendalltau

from allometry.configs.machine import HardwareConfig, load_hardware
from allometry.configs.run import RunConfig
from allometry.data.stream import open_stream
from allometry.launch.start import choose
from allometry.launch.text import table
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.mesh import Mesh, open_mesh
from allometry.scaling.plan import RunPlan
from allometry.scaling.planner.calibrate import Calibration, adapt
from allometry.scaling.planner.cases import Cases
from allometry.scaling.planner.cost import step_time
from allometry.scaling.search.case import Case
from allometry.studies.machine.ranks import become_rank, free_port
from allometry.studies.memory.probe import as_probed, write_tokens
from allometry.trainer.assemble import make_model, make_optimizer, make_train_step
from allometry.trainer.feed import sequence_steps

ROUNDS, STEPS, WARM_UP = 5, 2, 1
HARDWARE = "this machine"
GOALS = {"median": 0.10, "tau": 0.7}


@dataclass(frozen=True)
class Trial:
    """Run to measure: its ranks, model shape and overrides of the common settings."""

    name: str
    ranks: int
    width: int
    length: int
    micro_batch: int
    micro_batches: int = 2
    layers: int = 4
    experts: int = 0
    parallel: tuple[tuple[str, Any], ...] = ()
    checkpointing: str = "none"

    def config(self) -> RunConfig:
        """Return the complete config of the run."""
        model: dict[str, Any] = {
            **{"kind": "dense", "vocab_size": 4096, "width": self.width},
            **{"num_layers": self.layers, "num_heads": self.width // 64},
            **{"num_kv_heads": self.width // 64, "ffn_width": 3 * self.width},
        }
        if self.experts:
            inside = {"num_experts": self.experts, "experts_per_token": 2, "width": self.width}
            model |= {"kind": "moe", "experts": {"kind": "swiglu", **inside}}
            balance = {"kind": "auxiliary", "coefficient": 0.01, "loads": "step_before"}
            model["router"] = {"balance": balance}
            del model["ffn_width"]
        parallel = dict(self.parallel)
        data = self.ranks // parallel.get("tp", 1) // parallel.get("pp", 1)
        sequences = self.micro_batch * self.micro_batches * data
        training = {"total_steps": 2, "compute_dtype": "bf16", "compile": False}
        return RunConfig.model_validate(
            {
                "run": {"folder": "none"},
                "model": model,
                "data": {
                    "sequence_length": self.length,
                    "packing": "concatenated",
                    "sources": [{"name": "random", "train": "none"}],
                },
                "batch": {"sequences": sequences, "micro_batch_sequences": self.micro_batch},
                "training": training | {"activation_checkpointing": self.checkpointing},
                "optimizer": {"kind": "adamw", "lr": 1e-3},
                "schedule": {"kind": "constant"},
                "parallel": parallel,
            }
        )


def zero(stage: int) -> tuple[tuple[str, Any], ...]:
    return (("zero", {"stage": stage}),)


TP, PP, EP = (("tp", 2),), (("pp", 2),), (("ep", 2), *zero(1))
TRIALS = (
    Trial("dense 128, 4 x 256", 1, 128, 256, 4),
    Trial("dense 256, 4 x 256", 1, 256, 256, 4),
    Trial("dense 256, 1 x 256", 1, 256, 256, 1, micro_batches=4),
    Trial("dense 256, 8 x 128", 1, 256, 128, 8),
    Trial("dense 256, 1 x 1024", 1, 256, 1024, 1),
    Trial("dense 512, 2 x 512", 1, 512, 512, 2),
    Trial("dense 256, 4 x 256, full", 1, 256, 256, 4, checkpointing="full"),
    Trial("dense 256, 8 layers", 1, 256, 256, 4, layers=8),
    Trial("moe 128, 4 x 256", 1, 128, 256, 4, experts=8),
    Trial("moe 256, 4 x 256", 1, 256, 256, 4, experts=8),
    Trial("moe 256, 1 x 256", 1, 256, 256, 1, micro_batches=4, experts=8),
    Trial("dense 256, tp2", 2, 256, 256, 4, parallel=TP),
    Trial("dense 512, tp2", 2, 512, 512, 2, parallel=TP),
    Trial("dense 256, pp2", 2, 256, 256, 2, micro_batches=4, parallel=PP),
    Trial("dense 512, pp2", 2, 512, 256, 2, micro_batches=8, parallel=PP),
    *(Trial(f"dense 256, hdp2 ZeRO {s}", 2, 256, 256, 4, parallel=zero(s)) for s in range(4)),
    Trial("dense 512, hdp2 ZeRO 1", 2, 512, 512, 2, parallel=zero(1)),
    Trial("moe 256, hdp2 ZeRO 1", 2, 256, 256, 4, experts=8, parallel=zero(1)),
    Trial("moe 256, ep2", 2, 256, 256, 4, experts=8, parallel=EP),
    Trial("moe 256, tp2", 2, 256, 256, 4, experts=8, parallel=TP),
)


def run_rank(rank: int, ranks: int, names: Sequence[str], port: int, work: Path) -> None:
    """Run the named trials on one rank; the main rank writes a line for each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    become_rank(rank, ranks, port)
    for trial in TRIALS:
        if trial.name not in names:
            continue
        config = trial.config()
        here = open_mesh(config.parallel, torch.device("cpu"))
        with tempfile.TemporaryDirectory() as mine, here as mesh:
            folder = Path(mesh.broadcast_object(mine))
            rounds = mesh.gather_objects(timed_rounds(config, mesh, folder))
            mesh.barrier("writing what was measured")
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        if rank == 0:
            line = {"name": trial.name, "ranks": ranks, "rounds": rounds, "at": time.time()}
            with work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(trial.name, flush=True)


def timed_rounds(config: RunConfig, mesh: Mesh, folder: Path) -> list[dict[str, float]]:
    """Return wall-clock and CPU seconds of steps and of the reference work around them."""
    config = as_probed(config, folder)
    if mesh.is_main:
        write_tokens(config, folder)
    mesh.barrier("writing random tokens")
    plan = RunPlan.of(config, mesh.world_size)
    stream = open_stream(config.data, config.run.seed)
    inputs = list(sequence_steps(stream, plan, mesh, 0))
    batches = [batch.to(mesh.device) for batch in inputs[-1].batches]
    parallel = make_model(config, plan, mesh)
    optimizer = make_optimizer(config, plan, parallel, mesh)
    schedule = resolve_schedule(config, plan.batch)
    train_step = make_train_step(config, plan, parallel, optimizer, schedule, mesh)
    reference = Reference()

    def steps() -> None:
        for _ in range(STEPS):
            train_step(2, batches).to_host()

    for _ in range(WARM_UP):
        steps()
        reference()
    found = []
    for _ in range(ROUNDS):
        mesh.barrier("a round")
        before = clocked(reference)
        mesh.barrier("steps")
        wall, own = clocked(steps)
        mesh.barrier("the reference again")
        after = clocked(reference)
        found.append(
            {
                **{"wall": wall / STEPS, "cpu": own / STEPS},
                **{"reference": (before[0] + after[0]) / 2, "quiet": min(before[1], after[1])},
            }
        )
    return found


class Reference:
    """Fixed work of about 20 ms: products, passes over memory and small operators."""

    def __init__(self) -> None:
        self.left, self.right = (torch.randn(512, 512).bfloat16() for _ in range(2))
        self.large, self.small = torch.ones(1 << 20), torch.ones(64)

    def __call__(self) -> None:
        for _ in range(10):
            torch.mm(self.left, self.right)
            self.large.mul_(1.0)
            for _ in range(100):
                self.small.add_(1.0)


def clocked(work: Callable[[], object]) -> tuple[float, float]:
    """Run ``work``; return wall-clock seconds and CPU seconds of this process."""
    begun, own = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - own


def read(work: Path) -> dict[str, dict[str, float]]:
    """Return the seconds of each trial's step by kind of clock, for its slower rank."""
    lines = [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []
    rounds = [one for line in lines for rank in line["rounds"] for one in rank]
    quiet = statistics.median(one["quiet"] for one in rounds) if rounds else 0.0
    found = {}
    for line in lines:
        by_rank = [
            {
                "wall": statistics.median(one["wall"] for one in rank),
                "scaled": statistics.median(one["wall"] / one["reference"] for one in rank) * quiet,
                "cpu": statistics.median(one["cpu"] for one in rank),
                "busy": statistics.median(one["reference"] for one in rank) / quiet,
            }
            for rank in line["rounds"]
        ]
        found[line["name"]] = {key: max(rank[key] for rank in by_rank) for key in by_rank[0]}
    return found


def left_one_out(cases: Cases, seconds: np.ndarray, belief: Calibration) -> np.ndarray:
    """Return predicted seconds of each run with constants adapted to all other runs."""
    found = np.empty(len(cases))
    for index in range(len(cases)):
        others = np.arange(len(cases)) != index
        own = adapt(belief, cases.take(others), seconds[others])
        found[index] = step_time(cases.take(~others), own.constants("other")).seconds[0]
    return found


def compare(found: dict[str, dict[str, float]], hardware: HardwareConfig) -> dict[str, Any]:
    """Return rows of predicted and measured tokens/s, and errors by clock and process count."""
    trials = [trial for trial in TRIALS if trial.name in found]
    rows = [
        Case.of(t.config(), hardware, world_size=t.ranks, name=HARDWARE, device="cpu").row
        for t in trials
    ]
    cases = Cases.of(rows, {HARDWARE: hardware})
    belief, ranks = Calibration.before(hardware), np.array([t.ranks for t in trials])
    told = step_time(cases, belief.constants(hardware.generation))
    result: dict[str, Any] = {"trials": [], "summary": {}}
    for index, trial in enumerate(trials):
        result["trials"].append(
            {
                **{"name": trial.name, "ranks": trial.ranks, **found[trial.name]},
                **{"tokens": float(cases.step_tokens[index])},
                **{"predicted": float(told.seconds[index]), "terms": told.explain(index)},
            }
        )
    for clock in ("scaled", "cpu"):
        seconds = np.array([found[t.name][clock] for t in trials])
        adapted = left_one_out(cases, seconds, belief) if len(trials) > 2 else told.seconds
        for entry, own in zip(result["trials"], adapted, strict=True):
            entry[f"left_out_{clock}"] = float(own)
        for which, mask in (("all", ranks > 0), ("1 process", ranks == 1), ("2", ranks == 2)):
            if mask.sum() < 2:
                continue
            result["summary"][f"{clock}, {which}"] = {
                how: errors(cases.step_tokens[mask], seconds[mask], said[mask])
                for how, said in (("measured", told.seconds), ("left one out", adapted))
            }
    return result


def errors(tokens: np.ndarray, seconds: np.ndarray, said: np.ndarray) -> dict[str, float]:
    """Return relative errors of tokens/s, and Kendall's tau of the order of the runs."""
    error = np.abs(seconds / said - 1)
    tau = kendalltau(tokens / said, tokens / seconds).statistic
    return {
        **{"runs": len(said), "median": float(np.median(error)), "worst": float(error.max())},
        **{"bias": float(np.median(np.log(said / seconds))), "tau": float(tau)},
    }


def show(result: dict[str, Any]) -> None:
    lines = [["run", "ranks", "busy", "predicted", "scaled", "error", "cpu", "error", "left out"]]
    for one in result["trials"]:
        rate = {k: one["tokens"] / one[k] for k in ("predicted", "scaled", "cpu")}
        rate["left"] = one["tokens"] / one["left_out_scaled"]
        lines.append(
            [
                *(one["name"], str(one["ranks"]), f"{one['busy']:.1f}x"),
                *(f"{rate['predicted']:,.0f}", f"{rate['scaled']:,.0f}"),
                f"{rate['predicted'] / rate['scaled'] - 1:+.0%}",
                *(f"{rate['cpu']:,.0f}", f"{rate['predicted'] / rate['cpu'] - 1:+.0%}"),
                f"{rate['left'] / rate['scaled'] - 1:+.0%}",
            ]
        )
    print(table(lines, right=tuple(range(1, 9))))
    for name, parts in result["summary"].items():
        for how, e in parts.items():
            print(
                f"{name}, {how}: median {e['median']:.1%}, worst {e['worst']:.1%}, bias of log "
                f"time {e['bias']:+.3f}, tau {e['tau']:.2f}, {e['runs']} runs"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--hardware", default="this-machine", help="or a YAML file")
    parser.add_argument("--only", default="", help="runs with this in their name")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    hardware = load_hardware(asked.hardware)
    os.environ.update({**choose("auto", os.environ).environment, "OMP_NUM_THREADS": "1"})
    for ranks in (1, 2):
        done = read(asked.work)
        left = [t.name for t in TRIALS if t.ranks == ranks and t.name not in done]
        left = [name for name in left if asked.only in name]
        if left and not asked.show:
            torch.multiprocessing.start_processes(
                run_rank, (ranks, left, free_port(), asked.work), ranks, start_method="spawn"
            )
    result = compare(read(asked.work), hardware)
    show(result)
    if asked.json is not None:
        written = {**facts(), "goals": GOALS, "machine": hardware.model_dump(mode="json")}
        asked.json.write_text(json.dumps({**written, **result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
