"""Plant hangs in real launches and check that the watchdog reports the right rank and axis.

    python benchmarks/hangs.py --out hangs.json [--only TEXT] [--seconds S]

Each case starts two ranks through ``allometry.launch.torchrun``; one rank is stopped (SIGSTOP),
sleeps, or is killed inside a chosen function. A case passes if events.jsonl reports the rank, the
axis of the collective in which the other rank waits, and the step within ``timeout_s`` + 5 seconds;
if each rank's log contains the report; and if the launch exits with a nonzero code and leaves no
process. Cases already in ``--out`` are skipped. For example, ``--only tp2`` runs the cases with tp2
in their name.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from allometry.configs.loader import load
from allometry.data.synthetic import write_store

TIMEOUT_S, WITHIN_S, STEP, VOCAB = 4, 5.0, 3, 64
LIMIT_S = 100.0
DENSE: dict[str, Any] = {
    **{"kind": "dense", "vocab_size": VOCAB, "width": 32, "num_layers": 2, "num_heads": 4},
    **{"num_kv_heads": 2, "ffn_width": 64},
}
MOE: dict[str, Any] = {key: value for key, value in DENSE.items() if key != "ffn_width"} | {
    "kind": "moe",
    "experts": {"kind": "swiglu", "num_experts": 4, "experts_per_token": 2, "width": 32},
    "router": {"gate": "sqrt", "balance": {"kind": "auxiliary", "coefficient": 0.1}},
}
LAYOUTS: dict[str, tuple[str, ...]] = {
    "zero0": (),
    "zero1": ("parallel.zero.stage=1",),
    "saves": ("parallel.zero.stage=1", "checkpoint.asynchronous=false"),
    "zero3": ("parallel.zero.stage=3",),
    "tp2": ("parallel.tp=2",),
    "pp2": ("parallel.pp=2",),
    "ep2": ("parallel.ep=2", "parallel.zero.stage=1"),
    "ring": (
        *("data.kind=documents", "data.max_document_tokens=56", "batch.micro_batch_sequences=1"),
        *("parallel.context.min_chunk_tokens=4", "parallel.context.capacity_tokens=64"),
        *("parallel.context.policy=static", "parallel.context.degree=2"),
    ),
}
FSDP = "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup"
OURS = "allometry."


@dataclass(frozen=True)
class Case:
    """Hang of one rank ``at`` a function; the other rank waits in a collective over ``axes``.

    ``axes`` includes None if the other rank can detect the death before it waits for long. ``step``
    0: before the first step, or at the first call of the function.
    """

    layout: str
    at: str
    axes: tuple[str | None, ...]
    phase: str = "step"
    step: int = STEP
    how: str = "sleep"
    rank: int = 1

    @property
    def name(self) -> str:
        """Return a unique name of the case."""
        return f"{self.layout} {self.how} rank {self.rank} {self.at.removeprefix(OURS)}"


def cases() -> Iterator[Case]:
    """Yield all cases: a sleeping and a stopped rank for each axis, and places without an axis."""
    for how in ("sleep", "stop"):
        yield Case("zero0", OURS + "parallel.reduce:_Bucket.launch", ("hdp",), how=how)
        yield Case("zero1", FSDP + ".post_backward", ("hdp",), how=how)
        yield Case("zero3", FSDP + ".unshard", ("hdp",), how=how)
        yield Case("tp2", OURS + "parallel.tensor:scatter_sum", ("tp",), how=how)
        yield Case("pp2", OURS + "parallel.stage:Stage.backward_one_chunk", ("pp",), how=how)
        yield Case("ep2", OURS + "parallel.expert:AllToAll.__call__", ("ep",), how=how)
        yield Case("ring", OURS + "parallel.hdp.ring:_Hop.wait", ("hdp",), how=how)
        at = OURS + "trainer.state.integrity:ShardWriter.write_data"
        yield Case("saves", at, ("checkpoint", "host"), "checkpoint", how=how)
        at = OURS + "data.stream:Stream.batch"
        yield Case("zero0", at, ("hdp", "host", "all ranks"), step=STEP, how=how)
        at = OURS + "trainer.evaluate:Evaluator.__call__"
        yield Case("zero3", at, ("hdp",), "evaluation", 0, how)
    yield Case("pp2", OURS + "parallel.stage:Stage.forward_maybe_with_nosync", ("pp",), rank=0)
    yield Case("zero0", OURS + "optim.build:clip_by_global_norm", ("hdp",), how="stop", rank=0)
    at = OURS + "trainer.train:make_model"
    yield Case("zero3", at, ("host", "hdp"), "start", 0)
    yield Case("zero0", OURS + "parallel.mesh:open_groups", ("hdp", "all ranks"), "start", 0)
    yield Case(
        "zero0", OURS + "trainer.save:Saver.finish", ("host", "checkpoint"), "checkpoint", 0, "stop"
    )
    yield Case("zero0", OURS + "parallel.reduce:_Bucket.launch", ("hdp", None), how="die")


def described(case: Case, folder: Path, data: Path) -> Path:
    """Write the config of a case; return its path."""
    sources = [
        {"name": n, "train": f"{data}/{n}.train", "validation": f"{data}/{n}.validation"}
        for n in ("up", "down")
    ]
    run: dict[str, Any] = {
        "run": {"folder": str(folder / "run"), "seed": 3},
        "model": MOE if case.layout == "ep2" else DENSE,
        "data": {"sequence_length": 32, "sources": sources},
        "batch": {"sequences": 8, "micro_batch_sequences": 1},
        "training": {"total_steps": 6, "compute_dtype": "fp32", "compile": False},
        "optimizer": {"lr": 1e-2},
        "schedule": {"kind": "constant"},
        "parallel": {
            "timeout_s": TIMEOUT_S,
            "watch": dict.fromkeys(("start_s", "first_step_s", "checkpoint_s"), TIMEOUT_S),
        },
        "evaluation": {"sequences_per_source": 4, "every_steps": STEP},
        "checkpoint": {"every_steps": STEP},
        "record": {"tensorboard": False, "display_every_steps": 1},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(run))
    load(path, list(LAYOUTS[case.layout]))
    return path


def write_data(folder: Path) -> None:
    """Write two sources of short documents."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("up", "down"):
        for split, documents in (("train", 400), ("validation", 40)):
            texts = [
                np.append(rng.integers(1, VOCAB, n), 0) for n in rng.integers(5, 50, documents)
            ]
            write_store(folder / f"{name}.{split}", texts)


def run(case: Case, folder: Path, data: Path) -> dict[str, Any]:
    """Launch a case; return its outcome."""
    mark, here = folder / "mark", Path(__file__).resolve().parent
    config = described(case, folder, data)
    asked = {**asdict(case), "mark": str(mark)}
    path = os.pathsep.join(filter(None, [str(here / "hang_hook"), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"HANG": json.dumps(asked), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "allometry.launch.torchrun", "--nproc-per-node", "2", "--standalone"]
    train = ["-m", "allometry.launch.train", str(config), *LAYOUTS[case.layout]]
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "--local-addr", "127.0.0.1", *train],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
        )
        ranks = _wait(process, mark)
    left = [rank.pid for rank in ranks if rank.is_running() and rank.status() != "zombie"]
    found = verdict(case, folder, mark)
    problems = found.pop("problems")
    if process.returncode == 0 or left:
        problems.append(f"code {process.returncode}, processes left: {left}")
    return {**found, "passed": not problems, "problems": problems, "code": process.returncode}


def _wait(process: subprocess.Popen[bytes], mark: Path) -> list[psutil.Process]:
    """Wait until a launch has ended.

    A stopped rank is killed here after the other ranks had time to end; torchrun itself would kill
    it after 30 seconds.
    """
    ranks: list[psutil.Process] = []
    until = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < until:
        ranks = psutil.Process(process.pid).children(recursive=True) or ranks
        time.sleep(0.2)
        begun = float(mark.read_text() or "inf") if mark.exists() else math.inf
        if time.time() - begun > TIMEOUT_S + 2 * WITHIN_S:
            for rank in ranks:
                if rank.is_running() and rank.status() == psutil.STATUS_STOPPED:
                    rank.kill()
    for each in [*ranks, psutil.Process(process.pid)] if process.poll() is None else ():
        each.kill()
    process.wait()
    return ranks


def verdict(case: Case, folder: Path, mark: Path) -> dict[str, Any]:
    """Compare the events and logs of the run with the planted hang."""
    if not mark.exists():
        return {"problems": ["the place was never reached"]}
    begun, run_folder = float(mark.read_text()), folder / "run"
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    said = [event for event in events if event["event"] in ("hang", "rank_lost")]
    if len(said) != 1:
        return {"problems": [f"{len(said)} verdicts"]}
    event, problems = said[0], []
    after_s = event["time"] - begun
    expected: dict[str, tuple[Any, ...]] = {
        "late": ([case.rank],),
        "axis": case.axes,
        "phase": (case.phase,),
        "event": ("rank_lost",) if case.how in ("die", "stop") else ("hang",),
    }
    if case.step and case.phase == "step":
        expected["step"] = (case.step, case.step + 1) if "batch" in case.at else (case.step,)
    for key, values in expected.items():
        if event.get(key) not in values:
            problems.append(f"{key} is {event.get(key)}, not {values[0]}")
    if after_s > TIMEOUT_S + WITHIN_S:
        problems.append(f"said after {after_s:.1f} s")
    for rank in (0, 1):
        if not (run_folder / "logs" / f"rank-{rank}.log").exists():
            problems.append(f"rank {rank} has no log")
    return {"after_s": round(after_s, 2), "said": event["said"], "problems": problems}


def main() -> None:
    """Run the remaining cases and print their outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="results, as JSON")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin none after so long")
    asked = parser.parse_args()
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    until = time.monotonic() + asked.seconds
    with tempfile.TemporaryDirectory(prefix="hangs-") as scratch:
        data = Path(scratch) / "data"
        write_data(data)
        for number, case in enumerate(case for case in cases() if asked.only in case.name):
            if results.get(case.name, {}).get("passed") or time.monotonic() > until:
                continue
            folder = Path(scratch) / str(number)
            folder.mkdir()
            result = results[case.name] = run(case, folder, data)
            print("ok  " if result["passed"] else "FAIL", case.name, result, flush=True)
            if not result["passed"]:
                print((folder / "output").read_text()[-6000:])
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
    passed = sum(result["passed"] for result in results.values())
    print(f"{passed} of {len(results)} named rightly")


if __name__ == "__main__":
    main()
