"""Compare training speed with hand-written loops and transformers' Trainer, on this CPU.

    python benchmarks/throughput.py [--quick] [--only bf16|fp32|two]... [--rounds 5] [--json FILE]

Every run is a separate process; in each round all contenders run once, in alternating order. The
result of a run is the median over its timed steps; a result is the median over rounds of the ratio
of two runs of one round. benchmarks/README.md describes the comparisons.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from contenders import goals
from contenders.goals import DISTURBED, Comparison, Verdict
from contenders.race import Entry, Race, Run, alternate
from contenders.shape import SHAPE
from contenders.surroundings import surroundings

from allometry.launch.start import CHOICES, find_library

PARTS = ("bf16", "fp32", "two")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=3, help="steps of a run that are not timed")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=PARTS, action="append", help="parts to run; default all")
    parser.add_argument("--tcmalloc", action="store_true", help="also compare under tcmalloc")
    parser.add_argument(
        "--allocator", choices=CHOICES[1:], action="append", help="only these, best last"
    )
    parser.add_argument("--stage", type=int, action="append", help="only these ZeRO stages")
    parser.add_argument("--quick", action="store_true", help="one short round of the main pairs")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.warmup, given.steps = 1, 2, 4
    return given


def allocators_here(quick: bool, tcmalloc: bool) -> list[str]:
    """Return the available allocators, slowest first; the last is Allometry's choice here."""
    if quick:
        return ["glibc-tuned"]
    packages = ("tcmalloc", "jemalloc") if tcmalloc else ("jemalloc",)
    return ["system", "glibc-tuned", *(name for name in packages if find_library(name))]


def comparisons(
    parts: Sequence[str], allocators: Sequence[str], stages: Sequence[int]
) -> list[Comparison]:
    found: list[Comparison] = []
    if "bf16" in parts:
        found += goals.bf16(allocators)
    if "fp32" in parts:
        found += goals.fp32(allocators)
    if "two" in parts:
        found += goals.two(allocators, stages=stages)
    return found


def entries_of(wanted: Sequence[Comparison]) -> list[Entry]:
    """Return each entry once, in the order of the comparisons."""
    return list(dict.fromkeys(entry for comparison in wanted for entry in comparison.entries))


def print_rates(runs: Sequence[Run]) -> None:
    print("\ntokens/s (median of runs, least to most)")
    for entry in dict.fromkeys(run.entry for run in runs):
        rates = sorted(run.tokens_per_s for run in runs if run.entry == entry)
        print(
            f"  {statistics.median(rates):7.0f}  {rates[0]:7.0f} to {rates[-1]:<7.0f}  {entry.name}"
        )


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    print("\nratio of tokens/s (median over rounds of paired runs)")
    print("| setting | over | ratio | least to most | goal | |\n|---|---|---|---|---|---|")
    for verdict in verdicts:
        goal = "" if verdict.goal is None else f">= {verdict.goal}"
        mark = {None: "", True: "met", False: "NOT MET"}[verdict.met]
        ratios = f"{min(verdict.ratios):.2f} to {max(verdict.ratios):.2f}"
        print(
            f"| {verdict.setting} | {verdict.rival} | {verdict.median:.3f} | {ratios} | {goal} "
            f"| {mark} |"
        )
    for name in goals.PACKAGES:
        if find_library(name) is None:
            print(f"| as shipped, {name} | | | | | {name} is not installed |")


def main() -> None:
    given = arguments()
    allocators = given.allocator or allocators_here(given.quick, given.tcmalloc)
    stages = given.stage or ((0,) if given.quick else (0, 1, 2, 3))
    wanted = comparisons(given.only or PARTS, allocators, stages)
    facts = surroundings(SHAPE, given, allocators)
    cache = Path(tempfile.gettempdir()) / f"allometry-benchmark-inductor-{os.getuid()}"
    with tempfile.TemporaryDirectory(prefix="allometry-throughput-") as folder:
        race = Race(given.threads, given.warmup, given.steps, Path(folder), cache)
        runs = alternate(race, entries_of(wanted), given.rounds)
    verdicts = [goals.judge(comparison, runs) for comparison in wanted]
    print_rates(runs)
    print_verdicts(verdicts)
    disturbed = [run for run in runs if run.others_share > DISTURBED]
    if disturbed:
        print(
            f"\n{len(disturbed)} of {len(runs)} runs were disturbed: other processes took more "
            f"than {100 * DISTURBED:.0f} % of the cores; their rounds are left out"
        )
    path = given.json or Path(__file__).parent / "results" / (
        f"throughput-cpu-{datetime.date.today().isoformat()}.json"
    )
    result = {
        **facts,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "runs": [run.describe() for run in runs],
    }
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
