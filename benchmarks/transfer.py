"""Do rates found small hold large? Coordinate checks and learning-rate sweeps, by parameterization.

    python benchmarks/transfer.py [--quick] [--only PART ...] [--processes 2] [--work DIR]

A byte model on Python's library: heads of 16, qk-norm, fp32. ``coordinates``: how far activations
move; ``rates``: best rates over widths; ``depth``: over 2 to 8 layers; ``horizon``: over 40 to 320
steps, and their power of the length; ``experts``: over 1 to 32 experts, by HyperP and MSSP. Every
trial's loss is kept in --work as soon as it is known, so that the same command goes on where it was
interrupted, and that without --only at the end makes one result of all parts.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders.machine import facts
from contenders.movements import run_coordinates
from contenders.sweeps import HEADER, run_variant
from contenders.variants import PARTS, SEEDS


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, 20 steps, one seed")
    parser.add_argument(
        "--only", choices=("coordinates", *PARTS), action="append", help="default: all"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=None, help=f"default: {SEEDS}")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-transfer"))
    parser.add_argument("--json", type=Path, default=None)
    parsed = parser.parse_args(given)
    chosen = 1 if parsed.quick else parsed.seeds
    parsed.seeds_of = {part: chosen or seeds for part, seeds in SEEDS.items()}
    return parsed


def main(asked: Sequence[str] | None = None) -> None:
    given = arguments(asked)
    given.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**facts(), "seeds": given.seeds_of, "quick": given.quick}
    if not given.only or "coordinates" in given.only:
        result["coordinates"] = run_coordinates(given)
    for part, variants in PARTS.items():
        if given.only and part not in given.only:
            continue
        print(f"\n{part}\n{HEADER}")
        result[part] = [row for variant in variants for row in run_variant(part, variant, given)]
    path = given.json or Path(__file__).parent / "results" / (
        f"transfer-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
