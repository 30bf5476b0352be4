"""Test whether learning rates found on small models transfer to large ones, by parameterization.

    python benchmarks/transfer.py [--quick] [--only PART]... [--processes 2] [--work DIR]
    python benchmarks/transfer.py --size real --dry-run
    python benchmarks/transfer.py --size real [--only PART]... [--most-hours 1]

``--size bytes`` (the default): a byte model on Python's library with heads of 16, qk-norm, fp32.
``coordinates``: size of activation changes; ``rates``: best rates over widths; ``depth``: over 2 to
8 layers; ``horizon``: over 40 to 320 steps, with the fitted power of the length; ``experts``: over
1 to 32 experts, by HyperP and MSSP.

``--size real``: the regret of the transferred rate. BPE of 512 ids on the built-in corpora, WSD
with decay, 20 tokens per parameter at the base, widths 64 to 512, 2 to 16 layers, both together, 1
to 16 times the length and the batch, 1 to 64 experts, MSSP's regimes; 3 seeds. The study takes days
on a CPU: ``--dry-run`` prints the estimated hours on this machine, ``--most-hours`` excludes sizes
whose runs take longer. ``--size small`` is a cut of it that takes minutes; it only tests that the
code runs.

The loss of each trial is stored in --work when the trial ends, so that the same command continues
after an interruption; a final call without --only combines all parts into one result. For example,
``--only rates --only depth`` runs two parts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders.machine import facts
from contenders.movements import run_coordinates
from contenders.study import HEADER as STUDY_HEADER
from contenders.study import Text, line, row_of, run_entry, write
from contenders.study_families import CUTS, entries
from contenders.study_families import PARTS as STUDY_PARTS
from contenders.study_plan import jobs, lines, sizes_of, within
from contenders.sweeps import HEADER, run_variant
from contenders.variants import PARTS, SEEDS

RESULTS = Path(__file__).parent / "results"
OF_BYTES, OF_STUDY = ("quick", "seeds"), ("dry_run", "most_hours", "engine", "device")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("bytes", *CUTS), default="bytes")
    known = dict.fromkeys(("coordinates", *PARTS, *STUDY_PARTS))
    parser.add_argument("--only", choices=tuple(known), action="append", help="default: all")
    parser.add_argument("--processes", type=int, default=None, help="default: 2; 1 for small")
    parser.add_argument("--work", type=Path, default=None, help="default: runs/benchmark-transfer")
    parser.add_argument("--json", type=Path, default=None)
    ours = parser.add_argument_group("--size bytes")
    ours.add_argument("--quick", action="store_true", help="two sizes, 20 steps, one seed")
    ours.add_argument("--seeds", type=int, default=None, help=f"default: {SEEDS}")
    study = parser.add_argument_group("--size real, small")
    study.add_argument("--dry-run", action="store_true", help="print the plan and end")
    study.add_argument("--most-hours", type=float, default=None, help="of one run; default: any")
    study.add_argument("--engine", choices=("processes", "stacked"), default="processes")
    study.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of stacked runs")
    parsed = parser.parse_args(given)
    _check(parser, parsed)
    parsed.processes = parsed.processes or (1 if parsed.size == "small" else 2)
    chosen = 1 if parsed.quick else parsed.seeds
    parsed.seeds_of = {part: chosen or seeds for part, seeds in SEEDS.items()}
    named = "" if parsed.size == "bytes" else f"-{parsed.size}"
    parsed.work = parsed.work or Path(f"runs/benchmark-transfer{named}")
    return parsed


def _check(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """Exit with an error sentence for options that the size does not support."""
    bytes_only = parsed.size == "bytes"
    for name in OF_STUDY if bytes_only else OF_BYTES:
        if getattr(parsed, name) != parser.get_default(name):
            others = "real or small" if bytes_only else "bytes"
            parser.error(f"--{name.replace('_', '-')} is of --size {others}; leave it out")
    parts = ("coordinates", *PARTS) if bytes_only else STUDY_PARTS
    for part in parsed.only or ():
        if part not in parts:
            parser.error(f"--only {part} is no part of --size {parsed.size}: {', '.join(parts)}")
    if parsed.device == "cuda" and parsed.engine != "stacked":
        parser.error("--device cuda is of stacked runs; add --engine stacked")


def main(asked: Sequence[str] | None = None) -> None:
    given = arguments(asked)
    given.work.mkdir(parents=True, exist_ok=True)
    if given.size == "bytes":
        compare_bytes(given)
    else:
        study(given)


def compare_bytes(given: argparse.Namespace) -> None:
    result: dict[str, Any] = {**facts(), "seeds": given.seeds_of, "quick": given.quick}
    if not given.only or "coordinates" in given.only:
        result["coordinates"] = run_coordinates(given)
    for part, variants in PARTS.items():
        if given.only and part not in given.only:
            continue
        print(f"\n{part}\n{HEADER}")
        result[part] = [row for variant in variants for row in run_variant(part, variant, given)]
    path = given.json or RESULTS / f"transfer-cpu-{datetime.date.today().isoformat()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def study(given: argparse.Namespace) -> None:
    cut = CUTS[given.size]
    rows = entries(cut, given.only)
    planned = jobs(rows, given.work / "seconds.json")
    kept, left_out = within(planned, given.most_hours)
    plan = lines(kept, left_out, given.processes)
    print("\n".join(plan), flush=True)
    if given.dry_run:
        return
    text, sizes, start = Text.prepared(given.work / "text", cut), sizes_of(kept), time.monotonic()
    print(f"\n{text.tokens:,} tokens of training text\n{STUDY_HEADER}")
    found, made = {}, []
    for entry in rows:
        found[entry.name] = run_entry(entry, sizes[entry.name], text, given)
        compared = None if entry.compared is None else found.get(entry.compared)
        made.append(row_of(entry, found[entry.name], compared))
        print(line(made[-1]), flush=True)
    hours = (time.monotonic() - start) / 3600.0
    result = {
        **facts(),
        "size": cut.name,
        "seeds": cut.seeds,
        "text_tokens": text.tokens,
        "hours_of_this_command": hours,
        "plan": plan,
        "rows": made,
    }
    today = datetime.date.today().isoformat()
    where = given.work if cut.name == "small" else RESULTS
    write(given.json or where / f"transfer-{cut.name}-{given.device}-{today}.json", result)


if __name__ == "__main__":
    main()
