"""Profile a step of the 1.2B model: kernel time of two steps by kind, before and after a change.

    python benchmarks/gpu/kernels.py [--before COMMIT] [--model 1b|125m] [--out FILE]
    python benchmarks/gpu/kernels.py --check      # tiny shapes on a CPU, both trees: a rehearsal

Each tree (this one, and with --before that commit in a git worktree) is profiled in a separate
process: compiled, bf16, ZeRO 0, the trainer's steps on random tokens, after three warm-up steps.
Prints the share of the step by kind of kernel, the GPU's idle time, tokens/s and the slowest
kernels by name, so that a wrong kind is visible. Without a GPU it prints a message and exits with
code 0. Takes a few minutes per tree on an H100.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARMUP, PROFILED = 3, 2

KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|varlen|packed_attention|ring_attention"),
    ("optimizer", r"adam|lpnorm|_foreach_(norm|mul|div|add|lerp|sqrt|addc)|newton|multi_tensor"),
    ("softmax of the head", r"^(_whole|_statistics|_gradient)$|softmax_gradient|amax_copy.*gather"),
    ("products", r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitk|grouped_mm|wide_mm|::(add|b)?mm\b"),
    ("casts", r"bfloat16_copy|_foreach_copy|triton_poi_fused__to_copy(_t)?_\d+$|::_to_copy\b"),
    ("copies", r"memcpy|memset|copy_kernel|catarray|::copy_$|::cat$|::clone$|::fill_$|::zero_$"),
    ("communication", r"nccl|gloo|c10d"),
    ("elementwise and norms", r"triton_|elementwise|reduce_kernel|rms_norm|fxgraph|aten::"),
)
"""Kinds of kernels: the first whose expression matches the name, ignoring case."""

MODELS: dict[str, dict[str, Any]] = {
    "1b": {"base": "preset:dense_1b", "length": 4096, "micro": 8, "sequences": 16, "model": {}},
    "125m": {
        "base": "preset:dense_25m",
        "length": 2048,
        "micro": 64,
        "sequences": 64,
        "model": {
            "vocab_size": 50304,
            "width": 768,
            "num_layers": 12,
            "num_heads": 12,
            "ffn_width": 2048,
        },
    },
    "check": {
        "base": "preset:dense_25m",
        "length": 64,
        "micro": 2,
        "sequences": 4,
        "model": {
            "vocab_size": 512,
            "width": 64,
            "num_layers": 2,
            "num_heads": 4,
            "ffn_width": 128,
        },
    },
}


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator from its name; multi_tensor copies are casts."""
    if re.search("multi_tensor.*copy", name, re.IGNORECASE):
        return "casts"
    for kind, expression in KINDS:
        if re.search(expression, name, re.IGNORECASE):
            return kind
    return "other"


def shares(kernels: Iterable[tuple[str, float]], wall: float) -> dict[str, float]:
    """Convert seconds by name to wall-clock shares by kind, largest first, then ``idle``."""
    sums: dict[str, float] = {}
    for name, seconds in kernels:
        kind = kind_of(name)
        sums[kind] = sums.get(kind, 0.0) + seconds / wall
    ordered = dict(sorted(sums.items(), key=lambda item: -item[1]))
    return {**ordered, "idle": 1.0 - sum(sums.values())}


def profile(model: str) -> dict[str, Any]:
    """Take steps with the imported tree; profile the last steps."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = torch.cuda.is_available()

    def seconds(first: int) -> float:
        """Return the seconds of ``PROFILED`` steps that begin with step ``first``."""
        begun = time.perf_counter()
        for number in range(first, first + PROFILED):
            step(number)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    with steps(MODELS[model], torch.device("cuda" if on_gpu else "cpu")) as step:
        for number in range(1, WARMUP + 1):
            step(number)
        if on_gpu:
            torch.cuda.synchronize()
        plain = seconds(WARMUP + 1)
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        with profiler(activities=[kind]) as seen:
            wall = seconds(WARMUP + PROFILED + 1)
    kernels = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in seen.key_averages()
    }
    # On a GPU, annotations include the time of their kernels, which would be counted twice.
    notes = r"^(## Call|Torch-Compiled|Optimizer\.|ProfilerStep)" if on_gpu else r"^$"
    kernels = {n: s for n, s in kernels.items() if s > 0.0 and re.search(notes, n) is None}
    tokens = PROFILED * MODELS[model]["sequences"] * MODELS[model]["length"]
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "wall_s": wall,
        "tokens_per_s": tokens / plain,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "shares": shares(kernels.items(), wall),
        "kernels": sorted(kernels.items(), key=lambda item: -item[1]),
    }


@contextmanager
def steps(shape: dict[str, Any], device: Any) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the trainer's step with a given number."""
    from allometry.configs.loader import load
    from allometry.data.stream import Stream
    from allometry.data.synthetic import write_random_store
    from allometry.optim.schedule import resolve_schedule
    from allometry.parallel.mesh import open_mesh
    from allometry.scaling.plan import RunPlan
    from allometry.trainer.assemble import make_model, make_optimizer, make_train_step
    from allometry.trainer.feed import DeviceBatch

    with tempfile.TemporaryDirectory(prefix="allometry-kernels-") as folder:
        store = Path(folder) / "random"
        write_random_store(store, 2_000_000, shape["model"].get("vocab_size", 32_000))
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(description(shape, store, Path(folder) / "run")))
        config = load(path)
        plan = RunPlan.of(config, 1)
        stream = Stream(config.data, config.run.seed)
        with open_mesh(config.parallel, device) as mesh:
            parallel = make_model(config, plan, mesh)
            optimizer = make_optimizer(config, plan, parallel, mesh)
            schedule = resolve_schedule(config, plan.batch)
            take = make_train_step(config, plan, parallel, optimizer, schedule, mesh)

            def step(number: int) -> None:
                first = (number - 1) * shape["sequences"]
                places = range(first, first + shape["sequences"], shape["micro"])
                batches = [stream.batch(at, shape["micro"]) for at in places]
                pairs = zip(batches, places, strict=True)
                take(number, [DeviceBatch.of(batch, device, at) for batch, at in pairs])

            yield step


def description(shape: dict[str, Any], store: Path, run: Path) -> dict[str, Any]:
    """Return the config of the steps."""
    return {
        "base": shape["base"],
        "run": {"folder": str(run)},
        "model": shape["model"],
        "data": {
            "sequence_length": shape["length"],
            "packing": "concatenated",
            "sources": [{"name": "random", "train": str(store)}],
        },
        "batch": {"sequences": shape["sequences"], "micro_batch_sequences": shape["micro"]},
        "training": {
            "total_tokens": None,
            "total_steps": 100,
            "compute_dtype": "bf16",
            "compile": True,
        },
        "schedule": {"warmup_tokens": None, "warmup_steps": 0},
        "parallel": {"zero": {"stage": 0}},
    }


def of_tree(tree: Path, model: str) -> dict[str, Any]:
    """Profile the code of a tree in a separate process."""
    with tempfile.TemporaryDirectory(prefix="allometry-kernels-") as folder:
        out = Path(folder) / "out.json"
        environment = {**os.environ, "PYTHONPATH": str(tree / ".typing")}
        command = [sys.executable, __file__, "--profile", str(out), "--model", model]
        subprocess.run(command, env=environment, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def before(commit: str, model: str) -> dict[str, Any]:
    """Profile another commit."""
    with tempfile.TemporaryDirectory(prefix="allometry-kernels-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            return of_tree(tree, model)
        finally:
            git("worktree", "remove", "--force", str(tree))


def print_table(results: dict[str, dict[str, Any]]) -> None:
    kinds = dict.fromkeys(kind for result in results.values() for kind in result["shares"])
    print("\n| share of the step | " + " | ".join(results) + " |")
    print("|---|" + "---|" * len(results))
    for kind in kinds:
        cells = (f"{100 * result['shares'].get(kind, 0.0):.1f} %" for result in results.values())
        print(f"| {kind} | " + " | ".join(cells) + " |")
    rates = (f"{result['tokens_per_s']:.0f}" for result in results.values())
    print("| tokens/s, not profiled | " + " | ".join(rates) + " |")
    for name, result in results.items():
        print(f"\n{name}: the kernels that took longest (ms of {PROFILED} steps, kind, name)")
        for kernel, seconds in result["kernels"][:25]:
            print(f"  {1e3 * seconds:9.2f}  {kind_of(kernel):22} {kernel[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--before", metavar="COMMIT", help="also profile this commit")
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--check", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    parser.add_argument("--profile", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.profile is not None:
        given.profile.write_text(json.dumps(profile(given.model)), encoding="utf-8")
        return
    import torch

    if not given.check and not torch.cuda.is_available():
        print("skipped: this benchmark needs a CUDA device, and torch sees none (try --check)")
        return
    model = "check" if given.check else given.model
    results: dict[str, dict[str, Any]] = {}
    if given.before is not None:
        results[f"before ({git('rev-parse', '--short', given.before)})"] = before(
            given.before, model
        )
    results[f"here ({git('rev-parse', '--short', 'HEAD')})"] = of_tree(ROOT, model)
    print_table(results)
    if given.out is not None:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "model": model,
            "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
            "results": results,
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {given.out}")


if __name__ == "__main__":
    main()
