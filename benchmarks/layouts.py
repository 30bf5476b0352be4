"""Measure training speed of each parallel layout on two CPU processes, and the grouped product.

    python benchmarks/layouts.py [--quick] [--only PART]... [--rounds 5] [--json FILE]

Every run has its own process group (two processes with one thread each, gloo, the same allocator,
no compilation). In each round all layouts run once in alternating order, together with plain FSDP2
and with our trainer on one process with two threads. The result of a run is the median over its
timed steps; a result is the median over rounds of the ratio of two runs of one round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contenders import goals
from contenders.goals import DISTURBED, Comparison, Verdict
from contenders.race import Entry, Race, Run, alternate, with_allocator
from contenders.shape import SHAPES, Shape
from contenders.surroundings import surroundings

from allometry.configs.execution import SCHEDULES
from allometry.launch.start import CHOICES, find_library

THREADS = 2
PRODUCT_PART = "grouped"
PARTS = ("zero", "tensor", "pipeline", "checkpointing", "experts", PRODUCT_PART)


@dataclass(frozen=True)
class Row:
    """Layout with its two references: plain FSDP2, and one process with the same model."""

    part: str
    entry: Entry
    fsdp2: Entry
    alone: Entry

    @property
    def label(self) -> str:
        return self.entry.label

    @property
    def comparisons(self) -> tuple[Comparison, Comparison]:
        over_fsdp2, over_one = (
            Comparison(self.label, (self.entry,), rival, None) for rival in (self.fsdp2, self.alone)
        )
        return over_fsdp2, over_one


@dataclass(frozen=True)
class Layouts:
    """Build the rows. A rank runs its share of the batch at once, except in a pipeline."""

    shape: Shape
    dtype: str
    allocator: str

    def rows(self, parts: Sequence[str], quick: bool) -> list[Row]:
        """Return the rows of these parts; with ``quick``, the first and the last of each."""
        made = {
            "zero": [self._ours(f"hdp2, ZeRO {stage}", stage=stage) for stage in range(4)],
            "tensor": [self._tensor()],
            "pipeline": [self._pipeline(schedule) for schedule in SCHEDULES],
            "checkpointing": [self._ours("hdp2, ZeRO 0")]
            + [
                self._ours(
                    f"hdp2, ZeRO 0, {kind} checkpointing",
                    f"training.activation_checkpointing={kind}",
                )
                for kind in ("selective", "full")
            ],
            "experts": [
                self._ours("MoE, hdp2, ZeRO 0", *self._experts()),
                self._tensor("MoE, ", self._experts()),
                self._pipeline("1f1b", "MoE, ", self._experts()),
                self._ours("MoE, ep2, ZeRO 0", *self._experts(), "parallel.ep=2"),
            ],
        }
        fsdp2 = Entry("fsdp2", self.dtype, allocator=self.allocator, processes=2)
        alone = self._ours("1 process, 2 threads", processes=1)
        alone_moe = self._ours("MoE, 1 process, 2 threads", *self._experts(), processes=1)
        return [
            Row(part, entry, fsdp2, alone_moe if part == "experts" else alone)
            for part in parts
            if part in made
            for entry in _ends(made[part], quick)
        ]

    def _ours(self, label: str, *overrides: str, processes: int = 2, stage: int = 0) -> Entry:
        return Entry(
            "ours",
            self.dtype,
            allocator=self.allocator,
            processes=processes,
            stage=stage,
            label=label,
            # Schedules with a split backward cannot compile, and plain FSDP2 is not compiled here.
            overrides=("training.compile=false", *overrides),
        )

    def _tensor(self, label: str = "", overrides: Iterable[str] = ()) -> Entry:
        whole = f"batch.micro_batch_sequences={self.shape.sequences}"
        return self._ours(f"{label}tp2", *overrides, "parallel.tp=2", whole)

    def _pipeline(self, schedule: str, label: str = "", overrides: Iterable[str] = ()) -> Entry:
        return self._ours(
            f"{label}pp2, {schedule}",
            *overrides,
            "parallel.pp=2",
            f"parallel.pipeline.schedule={schedule}",
            "batch.micro_batch_sequences=1",
        )

    def _experts(self) -> tuple[str]:
        """Return a model override with as many active parameters: 2 of 8 half-width experts."""
        shape = self.shape
        model = {
            "kind": "moe",
            "vocab_size": shape.vocab_size,
            "width": shape.width,
            "num_layers": shape.num_layers,
            "num_heads": shape.num_heads,
            "experts": {
                "kind": "swiglu",
                "num_experts": 8,
                "experts_per_token": 2,
                "width": shape.ffn_width // 2,
            },
        }
        return (f"model={json.dumps(model)}",)  # JSON is YAML


def _ends(entries: list[Entry], quick: bool) -> list[Entry]:
    return list(dict.fromkeys((entries[0], entries[-1]))) if quick else entries


@dataclass(frozen=True)
class ProductRun:
    """All cases of ``contenders/grouped.py``, measured by one process."""

    round: int
    result: dict[str, Any]
    wall_s: float
    others_share: float


def run_products(race: Race, allocator: str, rounds: int, quick: bool) -> list[ProductRun]:
    runs = []
    out = race.folder / "grouped.json"
    for round in range(1, rounds + 1):
        command = [sys.executable, "-m", "contenders.grouped", "--out", str(out)]
        command += ["--size", "tiny", "--repeats", "3"] if quick else ["--size", "layouts"]
        command += [] if round % 2 else ["--reverse"]
        environment = with_allocator(race.environment(1), allocator)
        wall, others = race.start("grouped product", command, environment)
        result = json.loads(out.read_text(encoding="utf-8"))
        runs.append(ProductRun(round, result, wall, others))
        print(
            f"round {round}/{rounds}  grouped product  ({wall:.0f} s, others {100 * others:.0f} %)",
            flush=True,
        )
    return runs


def judge_products(runs: Sequence[ProductRun]) -> list[dict[str, Any]]:
    """Return the median seconds of each case and the speedups of ``grouped`` over the others."""
    kept = quiet(runs)
    found = []
    for index, case in enumerate(runs[0].result["cases"]):
        seconds = [run.result["cases"][index]["median_s"] for run in kept]
        ratios = {
            name: [other[name] / other["grouped"] for other in seconds]
            for name in seconds[0]
            if name != "grouped"
        }
        found.append(
            {
                **{key: case[key] for key in ("experts", "load", "dtype", "threads")},
                "median_s": statistics.median(of["grouped"] for of in seconds),
                "speedups": ratios,
                "median_speedup": {name: statistics.median(of) for name, of in ratios.items()},
            }
        )
    return found


def quiet(runs: Sequence[Any]) -> list[Any]:
    """Return the undisturbed runs, or all runs if there are none."""
    return [run for run in runs if run.others_share <= DISTURBED] or list(runs)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps of a run that are not timed")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a run")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the layouts")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run; default all")
    parser.add_argument(
        "--allocator",
        choices=CHOICES[1:],
        default="jemalloc" if find_library("jemalloc") else "glibc-tuned",
        help="of every process; default: what Allometry chooses here",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one round, the ends of each part"
    )
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    given.threads = THREADS
    if given.quick:
        given.rounds, given.warmup, given.steps = 1, 1, 2
    return given


def print_layouts(verdicts: Sequence[tuple[Row, Verdict, Verdict]], runs: Sequence[Run]) -> None:
    def rate(entry: Entry) -> float:
        return statistics.median(
            run.tokens_per_s for run in quiet([run for run in runs if run.entry == entry])
        )

    print("\ntokens/s, and its ratios (median over rounds of paired runs, least to most)")
    print(
        "| part | layout | tokens/s | over plain FSDP2 | over one process |\n|---|---|---|---|---|"
    )
    rows = [row for row, _, _ in verdicts]
    for entry in dict.fromkeys(rival for row in rows for rival in (row.fsdp2, row.alone)):
        print(f"| | {entry.name} | {rate(entry):.0f} | | |")
    rounds = max(run.round for run in runs)
    for row, *both in verdicts:
        ratios = [
            f"{v.median:.3f} ({min(v.ratios):.2f} to {max(v.ratios):.2f})"
            + ", all disturbed" * (v.disturbed_rounds == rounds)
            for v in both
        ]
        print(f"| {row.part} | {row.label} | {rate(row.entry):.0f} | {' | '.join(ratios)} |")


def print_products(cases: Sequence[dict[str, Any]]) -> None:
    names = list(cases[0]["speedups"])
    print("\ngrouped product, forward and backward: how many times faster (median, least to most)")
    print(f"| type | threads | experts | load | ms | {' | '.join(f'than {n}' for n in names)} |")
    print("|---|---|---|---|---|" + "---|" * len(names))
    for case in cases:
        ratios = [
            f"{case['median_speedup'][name]:.2f} ({min(found):.2f} to {max(found):.2f})"
            for name, found in case["speedups"].items()
        ]
        print(
            f"| {case['dtype']} | {case['threads']} | {case['experts']} | {case['load']} "
            f"| {1e3 * case['median_s']:.1f} | {' | '.join(ratios)} |"
        )


def print_disturbed(runs: Sequence[Run | ProductRun]) -> None:
    disturbed = [run for run in runs if run.others_share > DISTURBED]
    if disturbed:
        print(
            f"\n{len(disturbed)} of {len(runs)} runs were disturbed: other processes took more "
            f"than {100 * DISTURBED:.0f} % of the cores; their rounds are left out where others "
            "remain"
        )


def main() -> None:
    given = arguments()
    parts = given.only or PARTS
    name = "tiny" if given.quick else "layouts"
    shape = SHAPES[name]
    facts = surroundings(shape, given, [given.allocator])
    rows = Layouts(shape, given.dtype, given.allocator).rows(parts, given.quick)
    entries = dict.fromkeys(e for row in rows for e in (row.fsdp2, row.alone, row.entry))
    cache = Path(tempfile.gettempdir()) / f"allometry-benchmark-inductor-{os.getuid()}"
    with tempfile.TemporaryDirectory(prefix="allometry-layouts-") as folder:
        race = Race(THREADS, given.warmup, given.steps, Path(folder), cache, name)
        runs = alternate(race, list(entries), given.rounds)
        products = (
            run_products(race, given.allocator, given.rounds, given.quick)
            if PRODUCT_PART in parts
            else []
        )
    verdicts = []
    for row in rows:
        over_fsdp2, over_one = (goals.judge(comparison, runs) for comparison in row.comparisons)
        verdicts.append((row, over_fsdp2, over_one))
    if verdicts:
        print(f"\n{given.dtype}, {given.allocator}, {shape.tokens_per_step} tokens in a step")
        print_layouts(verdicts, runs)
    cases = judge_products(products) if products else []
    if cases:
        print_products(cases)
    print_disturbed([*runs, *products])
    path = given.json or Path(__file__).parent / "results" / (
        f"layouts-cpu-{datetime.date.today().isoformat()}.json"
    )
    result = {
        **facts,
        "dtype": given.dtype,
        "layouts": [
            {"part": row.part, "layout": row.label}
            | {"over_fsdp2": asdict(over_fsdp2), "over_one_process": asdict(over_one)}
            for row, over_fsdp2, over_one in verdicts
        ],
        "grouped_product": cases,
        "runs": [run.describe() for run in runs],
        "product_runs": [asdict(run) for run in products],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
