"""Check against kernel-enforced memory limits that runs fail where the prediction says.

    python benchmarks/memory_limits.py [--only WORD] [--work FILE] [--json OUT] [--layers-times N]

Single-process cases of ``memory.py`` take two steps under a limit enforced by the kernel
(RLIMIT_DATA: private writable memory), which is a share of the predicted peak added to the memory
in use before the run. Bisection finds the smallest share at which a case survives. A case is
predicted to fit if the limit is at least the prediction. Large blocks are mapped individually
(glibc's MALLOC_MMAP_THRESHOLD_), so that freed memory is returned to the system. FILE receives one
line per case; the same command continues with the remaining cases.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contenders.machine import facts
from memory import Case, cases

from allometry.configs.run import RunConfig
from allometry.data.stream import open_stream
from allometry.launch.text import size, table
from allometry.optim.schedule import resolve_schedule
from allometry.parallel.mesh import open_mesh
from allometry.scaling.plan import RunPlan
from allometry.studies.memory.probe import as_probed, predicted, write_tokens
from allometry.trainer.assemble import make_model, make_optimizer, make_train_step
from allometry.trainer.feed import sequence_steps

SHARES = (0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2, 1.25)
CHOSEN = (
    *("dense, bf16", "dense, full", "dense, few tokens", "dense, saved FP8", "dense, FP8 states"),
    *("moe, bf16", "moe, selective", "moe, MuonH, few tokens", "moe, saved FP8", "moe, latent"),
)
SETTINGS = {
    **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    **{"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},
    # oneDNN's cache of code for each shape, mostly of experts' rows, is not tensor memory.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}
ENDED, STACK = 3, 1 << 20


def two_steps(config: RunConfig, limit: int | None) -> None:
    """Train two steps on random tokens, like the probe, within ``limit`` additional bytes."""
    with open_mesh(config.parallel, torch.device("cpu")) as mesh:
        plan = RunPlan.of(config, 1)
        stream = open_stream(config.data, config.run.seed)
        if limit is not None:
            bound = held() + limit
            resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
        parallel = make_model(config, plan, mesh)
        optimizer = make_optimizer(config, plan, parallel, mesh)
        schedule = resolve_schedule(config, plan.batch)
        train_step = make_train_step(config, plan, parallel, optimizer, schedule, mesh)
        for number, step in enumerate(sequence_steps(stream, plan, mesh, 0), 1):
            train_step(number, [batch.to(mesh.device) for batch in step.batches])


def held() -> int:
    """Return the bytes that the kernel currently counts against RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not say what RLIMIT_DATA counts")


def survives(config: RunConfig, limit: int) -> bool:
    """True if a child process completes the steps under the limit."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            two_steps(config, limit)
            code = 0
        except (MemoryError, RuntimeError) as error:
            # A failed thread stack is out of memory too; oneDNN gives no reason for a failed
            # primitive.
            words = ("alloc", "start new thread", "create a primitive")
            short = isinstance(error, MemoryError) or any(w in str(error).lower() for w in words)
            code = ENDED if short else 1
            if not short:
                print(error, file=sys.stderr)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, ENDED) and code >= 0:
        raise SystemExit("a run ended for another reason than memory")
    return code == 0


def smallest(config: RunConfig, expected: int) -> float:
    """Return the smallest of ``SHARES`` of ``expected`` bytes that the run survives, else inf."""
    low, high = -1, len(SHARES)
    while high - low > 1:
        middle = (low + high) // 2
        if survives(config, int(SHARES[middle] * expected)):
            high = middle
        else:
            low = middle
    return SHARES[high] if high < len(SHARES) else float("inf")


def measure(case: Case) -> dict[str, Any]:
    """Measure a case; return its line."""
    expected = predicted(case.config(), 1, "cpu", None).total
    with tempfile.TemporaryDirectory() as scratch:
        config = as_probed(case.config(), Path(scratch))
        write_tokens(config, Path(scratch))
        share = smallest(config, expected)
    return {"name": case.name, "predicted": expected, "survives": share}


def decisions(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Count right and wrong decisions over all cases and shares, by kind of error."""
    found = {"decisions": 0, "refused_what_fits": 0, "let_in_what_does_not": 0}
    for line in lines:
        for share in SHARES:
            fits, said = share >= line["survives"], share >= 1
            found["decisions"] += 1
            found["refused_what_fits"] += fits and not said
            found["let_in_what_does_not"] += said and not fits
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "limits.jsonl"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers-times", type=int, default=1, help="so many times the layers")
    asked = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))  # of all later threads
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    text = asked.work.read_text() if asked.work.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    known = {line["name"] for line in lines}
    chosen = [
        replace(c, model=c.model | {"num_layers": asked.layers_times * c.model["num_layers"]})
        for c in cases()
        if c.name in CHOSEN and asked.only in c.name
    ]
    with tempfile.TemporaryDirectory() as scratch:  # fill the caches of libraries
        first = as_probed(chosen[0].config(), Path(scratch))
        write_tokens(first, Path(scratch))
        two_steps(first, None)
    for case in chosen:
        if case.name not in known:
            lines.append(measure(case))
            with asked.work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(lines[-1], flush=True)
    head = ["case", "predicted", "survives from"]
    body = [[x["name"], size(x["predicted"]), f"{x['survives']:.0%}"] for x in lines]
    print(table([head, *body], right=(1, 2)))
    print(found := decisions(lines))
    if asked.json is not None:
        written = {**facts(), "shares": list(SHARES), "cases": lines, **found}
        asked.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
