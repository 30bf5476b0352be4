"""Compare policies of hybrid data/context parallelism on two CPU processes, on real documents.

    python benchmarks/hdp.py [--quick] [--rounds 3] [--context 16384] [--json FILE]

The documents are the standard library's files, cut at ``--context`` tokens. A rank's micro-batch
has half as many tokens, so static context parallelism uses rings of both ranks for every document.
The same steps on the same tokens run under each policy in alternating order, on two processes with
one thread each. The ideal is twice the rate of one process with one thread whose micro-batch fits a
complete document. Tokens/s are totals over all timed steps of a run; ratios are between runs of one
round, and their median over rounds is reported. ``benchmarks/hdp_simulated.py`` simulates 1,024
ranks.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders.goals import DISTURBED
from contenders.race import Race, free_port, with_allocator
from contenders.surroundings import surroundings

from allometry.data.prepare import PrepareRequest, prepare
from allometry.launch.start import CHOICES, find_library

GOAL = 1.3
IDEAL = "one process, x 2"
STATIC = "static, degree 2"


@dataclass(frozen=True)
class Entry:
    """Policy and its number of processes."""

    name: str
    processes: int
    capacity: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """Run of an entry: tokens and seconds of its timed steps, and its losses."""

    name: str
    round: int
    tokens: int
    seconds: float
    losses: list[float]
    degrees: dict[str, int]
    bytes_sent: int
    others_share: float

    @property
    def rate(self) -> float:
        """Return tokens/s; for the ideal, twice the rate of its one process."""
        return self.tokens / self.seconds * (2 if self.name == IDEAL else 1)


def entries(context: int) -> list[Entry]:
    half = context // 2
    policy = "parallel.context.policy="
    return [
        Entry(IDEAL, 1, context),
        Entry(STATIC, 2, half, (f"{policy}static", "parallel.context.degree=2")),
        Entry("naive", 2, half, (f"{policy}naive",)),
        Entry("balanced", 2, half, (f"{policy}balanced",)),
    ]


def describe(given: argparse.Namespace, store: Path, steps: int) -> dict[str, Any]:
    return {
        "run": {"folder": "set for each run"},
        "model": {
            "kind": "dense",
            "vocab_size": given.vocab,
            "width": given.width,
            "num_layers": given.layers,
            "num_heads": given.width // 64,
            "num_kv_heads": max(1, given.width // 64 // given.queries_per_key),
            "ffn_width": 4 * given.width,
        },
        "data": {
            "kind": "documents",
            "sequence_length": given.context // 4,
            "max_document_tokens": given.context,
            "sources": [{"name": "python", "train": str(store / "python-code.train")}],
        },
        "batch": {"sequences": 4 * given.documents, "micro_batch_sequences": 1},
        "training": {"total_steps": steps, "compute_dtype": given.dtype},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "constant"},
        "parallel": {
            # Rates of these two cores, so that plans weigh attention and messages for this machine.
            "context": {
                "costs": {
                    "tflops": given.gflops / 1e3,
                    "attention_efficiency": given.attention_efficiency,
                    "bandwidth_gb_per_s": given.bandwidth,
                }
            }
        },
        "record": {"tensorboard": False},
    }


def run(race: Race, given: argparse.Namespace, config: Path, entry: Entry, round: int) -> Run:
    """Start a run of an entry with the command of a user."""
    with tempfile.TemporaryDirectory(dir=race.folder) as place:
        command = [sys.executable]
        if entry.processes > 1:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(entry.processes)]
            command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        command += ["-m", "allometry.launch.train", str(config), *entry.settings]
        command += [f"run.folder={place}/run", "--allocator", given.allocator]
        command.append(f"parallel.context.capacity_tokens={entry.capacity}")
        environment = with_allocator(race.environment(2), given.allocator)
        _, others = race.start(entry.name, command, environment)
        lines = (Path(place) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    timed = rows[given.warmup :]
    degrees: dict[str, int] = {}
    for row in timed:
        for key, number in row.items():
            if key.startswith("hdp/degree/"):
                degrees[key[11:]] = degrees.get(key[11:], 0) + number
    found = Run(
        name=entry.name,
        round=round,
        tokens=timed[-1]["tokens"] - rows[given.warmup - 1]["tokens"],
        seconds=sum(row["time_s"] for row in timed),
        losses=[row["loss"] for row in rows],
        degrees=degrees,
        bytes_sent=sum(row["hdp/bytes_sent"] for row in timed),
        others_share=others,
    )
    print(
        f"round {round}/{given.rounds}  {found.rate:7.0f} tok/s  {entry.name}  documents by degree "
        f"{degrees}, {found.bytes_sent / 1e6:.0f} MB, others {100 * others:.0f} %",
        flush=True,
    )
    return found


def ratios(runs: Sequence[Run], above: str, below: str) -> list[float]:
    """Return the ratio of rates ``above`` / ``below`` by round, of undisturbed rounds if any."""
    rounds = sorted({r.round for r in runs})
    of = {(r.name, r.round): r for r in runs}
    pairs = [(of[above, n], of[below, n]) for n in rounds]
    quiet = [p for p in pairs if max(r.others_share for r in p) <= DISTURBED]
    return [a.rate / b.rate for a, b in quiet or pairs]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps of a run that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--context", type=int, default=16384, help="longest document, in tokens")
    parser.add_argument("--documents", type=int, default=4, help="contexts of tokens in a step")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--queries-per-key", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--gflops", type=float, default=150.0, help="a core's, in products")
    parser.add_argument("--attention-efficiency", type=float, default=0.15)
    parser.add_argument("--bandwidth", type=float, default=1.0, help="between processes, GB/s")
    parser.add_argument(
        "--allocator",
        choices=CHOICES[1:],
        default="jemalloc" if find_library("jemalloc") else "glibc-tuned",
    )
    parser.add_argument("--quick", action="store_true", help="one round of two steps, 2K context")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.threads = 2
    if given.quick:
        given.rounds, given.steps, given.context = 1, 2, 2048
    return given


def main() -> None:
    given = arguments()
    cache = Path(tempfile.gettempdir()) / f"allometry-benchmark-inductor-{os.getuid()}"
    with tempfile.TemporaryDirectory(prefix="allometry-hdp-") as folder:
        race = Race(2, given.warmup, given.steps, Path(folder), cache, "tiny")
        store = Path(folder) / "store"
        inputs = ("builtin:python-code",)
        prepare(PrepareRequest(inputs, str(store), vocab_size=given.vocab), quiet=True)
        config = Path(folder) / "config.yaml"
        text = describe(given, store, given.warmup + given.steps)
        config.write_text(json.dumps(text), encoding="utf-8")
        runs = []
        for round in range(1, given.rounds + 1):
            turn = entries(given.context)
            for entry in turn if round % 2 else turn[::-1]:
                runs.append(run(race, given, config, entry, round))
    worst = max(abs(a - b) for r in runs for a, b in zip(r.losses, runs[0].losses, strict=True))
    table = {}
    print(
        "\n| policy | tokens/s | over static (least to most) | over the ideal |\n|---|---|---|---|"
    )
    for entry in entries(given.context):
        rate = statistics.median(r.rate for r in runs if r.name == entry.name)
        static, ideal = (ratios(runs, entry.name, other) for other in (STATIC, IDEAL))
        table[entry.name] = {"tokens_per_s": rate, "over_static": static, "over_ideal": ideal}
        print(
            f"| {entry.name} | {rate:.0f} | {statistics.median(static):.3f} ({min(static):.2f} to "
            f"{max(static):.2f}) | {statistics.median(ideal):.3f} |"
        )
    reached = statistics.median(table["balanced"]["over_static"])
    verdict = "met" if reached >= GOAL else "NOT MET"
    print(
        f"\nbalanced over static {reached:.3f}, goal {GOAL}: {verdict}; losses of all runs within "
        f"{worst:.1e}"
    )
    path = given.json or Path(__file__).parent / "results" / (
        f"hdp-cpu-{datetime.date.today().isoformat()}.json"
    )
    result = {
        **surroundings(race.shape, given, [given.allocator]),
        "model": text["model"],
        "table": table,
        "goal": GOAL,
        "met": reached >= GOAL,
        "largest_loss_difference": worst,
        "runs": [asdict(r) for r in runs],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
