"""Hold out the largest size of a ladder and predict its losses with laws of the smaller sizes.

    python benchmarks/ladder.py [--parallel 2] [--json FILE] [RUNS ...]

Trains the missing runs of `ladder.yaml` on the built-in corpora, or reads the given runs. Each law
is fitted to all sizes except the largest and predicts the losses of the largest size's runs, each
with the 95 % interval of one run (bootstrap over cells, and the scatter of runs). The longest
horizon and each single cell are held out in the same way.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from contenders.machine import facts

from allometry.configs.errors import UserError
from allometry.launch.studies.ladder.stages import open_ladder, run
from allometry.laws.collect import from_runs
from allometry.laws.fit.bootstrap import bootstrap
from allometry.laws.fit.engine import fit
from allometry.laws.fit.validate import leave_one_group_out
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named

LADDER = Path(__file__).parent / "ladder.yaml"
LAWS = ("over_training", "chinchilla", "kaplan")
GOAL = 0.01


def held_out(law: str, rows: Observations, by: str) -> dict[str, Any]:
    """Fit a law without the rows with the largest value of a column, and predict these rows."""
    largest_n = rows[by] == rows[by].max()
    rest, part = rows.take(~largest_n), rows.take(largest_n)
    found = fit(form_named(law), rest)
    predicted_n, measured_n = found.predict(part), part["loss"]
    low_n, high_n = bootstrap(found).predict_interval(part, noise=True)
    errors_n = predicted_n / measured_n - 1.0
    inside_n = (low_n <= measured_n) & (measured_n <= high_n)
    certificate = found.certificate
    return {
        "held_out": f"largest {by}",
        "fitted_rows": len(rest),
        "rows": [
            {"group": group, "measured": m, "predicted": p, "low": low, "high": high, "error": e}
            for group, m, p, low, high, e in zip(
                part.groups,
                *(v.tolist() for v in (measured_n, predicted_n, low_n, high_n, errors_n)),
                strict=True,
            )
        ],
        "mean": float(np.abs(errors_n).mean()),
        "max": float(np.abs(errors_n).max()),
        "covered": int(inside_n.sum()),
        "not_identified": [*certificate.unidentified, *certificate.loose],
    }


def each_cell(law: str, rows: Observations) -> dict[str, Any]:
    found = leave_one_group_out(form_named(law), rows)
    losses_n = found.measured
    errors_n = (
        found.errors if found.relative else found.errors / losses_n
    )  # of a law with linear residuals
    return {
        "held_out": "each cell",
        "mean": float(np.abs(errors_n).mean()),
        "max": float(np.abs(errors_n).max()),
    }


def show(law: str, row: dict[str, Any]) -> None:
    covered = f"{row['covered']} of {len(row['rows'])}" if "rows" in row else "-"
    open_names = ", ".join(row.get("not_identified", [])) or "-"
    print(
        f"| {law} | {row['held_out']} | {row['mean']:.2%} | {row['max']:.2%} | {covered} "
        f"| {open_names} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="runs to read instead of training")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    folders = given.runs
    if not folders:
        plan = open_ladder(str(LADDER))
        run(plan, "rungs", given.parallel, print)
        folders = [rung.folder for rung in plan.rungs]
    rows = from_runs(folders)
    print("\n| law | held out | mean error | largest | inside the interval | not identified |")
    print("|---|---|---|---|---|---|")
    laws: dict[str, Any] = {}
    for law in LAWS:
        laws[law] = []
        for by in ("N", "D"):
            try:
                laws[law].append(held_out(law, rows, by))
            except UserError as error:
                print(f"{law}, largest {by}: {error}")
                continue
            show(law, laws[law][-1])
        laws[law].append(each_cell(law, rows))
        show(law, laws[law][-1])
    best = laws[LAWS[0]][0]
    met = best["mean"] < GOAL and best["covered"] == len(best["rows"])
    print(
        f"\n{LAWS[0]}, largest size: mean error {best['mean']:.2%}, goal {GOAL:.0%} with every run "
        f"inside its interval: {'met' if met else 'NOT met'}"
    )
    result = {
        **facts(),
        "rows": {name: values.tolist() for name, values in rows.columns.items()},
        "groups": list(rows.groups),
        "conventions": dict(rows.conventions),
        "laws": laws,
        "met": met,
    }
    path = given.json or Path(__file__).parent / "results" / (
        f"ladder-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
