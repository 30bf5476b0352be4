"""Measure the coverage of laws' 95 % intervals beyond the fitted compute.

    python benchmarks/law_intervals.py --data DATA/laws [--simulations 60] [--json out.json]

``--data``: a folder with the public measurements chinchilla_epoch (Besiroglu et al., arXiv
2404.10102; the 240 points), datablations (Muennighoff et al., arXiv 2305.16264; runs that see no
token twice and did not diverge) and overtraining (Gadre et al., arXiv 2403.08540; trained on C4,
loss on C4). Each law is fitted to the rows up to a quantile of N D (half, three quarters, nine
tenths) and predicts the rows above. *Parameters*: intervals of the bootstrap alone, without the
error of the form. *Whole*: intervals of ``predict``. Both are computed for the law and for one run
(``noise=True``). Measured rows scatter, so the intervals of one run should cover 95 %.

Simulated ladders (8x8, 5x5 and 4x3 of N and D, noise 0.3 %) follow the fitted law, and the
predicted point has 10 times the largest N and D: intervals of the law should cover the truth at
their nominal rate, and be only slightly wider than without the error of the form.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from allometry.configs.errors import UserError
from allometry.launch.text import table
from allometry.laws.fit.bootstrap import Bootstrap, bootstrap
from allometry.laws.fit.engine import fit, predict
from allometry.laws.observations import Observations
from allometry.laws.registry import form_named
from allometry.laws.tables import read_table

CUTS = (0.5, 0.75, 0.9)
TRUTHS = {
    "chinchilla": {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37},
    "kappa": {"E": 1.7, "A": 2e3, "B": 3e4, "a": 0.5, "b": 0.55, "kappa": 0.7},
    "farseer": {
        "endless": 0.75,
        "endless_slope": -0.03,
        "gamma": 0.2,
        "coefficient": 5.0,
        "coefficient_slope": -0.9,
        "beta": -0.1,
        "exponent": -1.2,
        "exponent_slope": -0.12,
        "alpha": 0.12,
    },
}
NOISE = 3e-3


def public(data: Path) -> Iterator[tuple[str, Observations]]:
    names = ("N", "D", "loss")
    yield (
        "chinchilla_epoch",
        read_table(
            data / "chinchilla_epoch/svg_extracted_data.csv",
            names,
            mapping={"N": "Model Size", "D": "`Training FLOP`/(6*N)"},
            where=["loss < 3.44"],
        ),
    )
    yield (
        "datablations",
        read_table(
            data / "datablations/parametric_fit_296.csv", names, where=["D <= U", "loss < 6"]
        ),
    )
    yield (
        "overtraining",
        read_table(
            data / "overtraining/overtraining_104.csv",
            names,
            mapping={"loss": "loss_c4_val"},
            where=["dataset == 'c4_original'"],
        ),
    )


def within(sampled: Bootstrap, rows: Observations, *, noise: bool) -> tuple[int, float]:
    """Count the rows inside their intervals; return the count and the median half width in logs."""
    low_n, high_n = sampled.predict_interval(rows, noise=noise)
    measured_n = rows["loss"]
    inside = int(((low_n <= measured_n) & (measured_n <= high_n)).sum())
    return inside, float(np.median(np.log(high_n / low_n)) / 2)


def beyond(name: str, rows: Observations, law: str, share: float, samples: int) -> dict[str, Any]:
    compute_n = rows["N"] * rows["D"]
    kept_n = compute_n <= np.quantile(compute_n, share)
    held = rows.take(~kept_n)
    row: dict[str, Any] = {"set": name, "law": law, "cut": share, "rows": len(held)}
    try:
        found = fit(form_named(law), rows.take(kept_n))
    except UserError as error:
        return {**row, "problem": str(error)}
    whole = bootstrap(found, samples)
    row["error"] = float(np.abs(np.log(found.predict(held) / held["loss"])).mean())
    for kind, sampled in (("parameters", replace(whole, form_error=None)), ("whole", whole)):
        for of, noise in (("law", False), ("run", True)):
            inside, width = within(sampled, held, noise=noise)
            row[f"{kind}, {of}"] = {"inside": inside, "half_width": width}
    return row


def simulated(law: str, number: int, samples: int) -> dict[str, Any]:
    form, values = form_named(law), TRUTHS[law]
    hits, ratios = dict.fromkeys(("parameters", "whole"), 0), []
    target = Observations.of({"N": [1e10], "D": [2e11]})
    target = Observations.of({**target.columns, "loss": predict(form, values, target)})
    for simulation in range(number):
        sizes, horizons = ((8, 8), (5, 5), (4, 3))[simulation % 3]
        n, d = np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e8, 2e10, horizons))
        rows = Observations.of({"N": n.ravel(), "D": d.ravel()})
        noise = NOISE * np.random.default_rng(1000 + simulation).standard_normal(len(rows))
        loss = predict(form, values, rows) * np.exp(noise)
        whole = bootstrap(fit(form, Observations.of({**rows.columns, "loss": loss})), samples)
        widths = []
        for kind, sampled in (("parameters", replace(whole, form_error=None)), ("whole", whole)):
            inside, width = within(sampled, target, noise=False)
            hits[kind] += inside
            widths.append(width)
        ratios.append(widths[1] / widths[0])
    wider = {"median": float(np.median(ratios)), "nine tenths": float(np.quantile(ratios, 0.9))}
    return {"law": law, "simulations": number, "covered": hits, "wider_by": wider}


def shown(rows: list[dict[str, Any]], truths: list[dict[str, Any]]) -> str:
    kinds = ("parameters, law", "whole, law", "parameters, run", "whole, run")
    header = ["set", "law", "rows beyond", "mean error", *kinds, "half width, run"]
    lines = [header]
    for name, law in dict.fromkeys((row["set"], row["law"]) for row in rows):
        mine = [r for r in rows if (r["set"], r["law"]) == (name, law) and "problem" not in r]
        total = sum(row["rows"] for row in mine)
        cells = [f"{sum(row[kind]['inside'] for row in mine)} of {total}" for kind in kinds]
        widths = [np.median([r[k]["half_width"] for r in mine]) for k in kinds[2:]]
        error = sum(row["error"] * row["rows"] for row in mine) / max(total, 1)
        wide = " -> ".join(f"{width:.1%}" for width in widths)
        lines.append([name, law, str(total), f"{error:.2%}", *cells, wide])
    second = [["simulated truth", "parameters", "whole", "wider by (median, nine tenths)"]]
    for truth in truths:
        hits = (f"{hit} of {truth['simulations']}" for hit in truth["covered"].values())
        wider = ", ".join(f"{ratio:.2f}" for ratio in truth["wider_by"].values())
        second.append([truth["law"], *hits, wider])
    return f"{table(lines)}\n\n{table(second)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--simulations", type=int, default=60)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = [
        beyond(name, observations, law, share, asked.samples)
        for name, observations in public(asked.data)
        for law in TRUTHS
        for share in CUTS
    ]
    truths = [simulated(law, asked.simulations, asked.samples) for law in TRUTHS]
    print(shown(rows, truths))
    if asked.json is not None:
        result = {"samples": asked.samples, "beyond": rows, "simulated": truths}
        asked.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
