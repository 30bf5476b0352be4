"""Write laws/transfers.json, which ``allometry suggest`` reads, from results of transfer.py.

    python benchmarks/transfer_table.py benchmarks/results/transfer-cpu-2026-11-24.json [...]

The order of the results matters: of two rows for the same rules over the same axis, the later row
is shown. Regrets are computed from the losses of every run in a result.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders.families import LENGTH, SEQUENCES, STEPS, Reading, Variant, optimizer
from contenders.sweeps import under
from contenders.variants import PARTS

from allometry.laws.optimum import Sweep, drift
from allometry.laws.regret import regrets
from allometry.laws.transfers import FILE
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.outcome import Transfer, Trial

ROOT = Path(__file__).resolve().parents[1]
OTHER_RULES: Mapping[str, Mapping[str, Any]] = {"hyperp, T^-0.32": {"data_exponent": 0.32}}
"""Overrides of readings that are a different configuration; other readings cannot be configured."""


def table(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the content of the file."""
    made = [entry for path in paths for entry in entries(path)]
    return {"kind": "allometry.transfers", "version": 1, "entries": made}


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield an entry for each sweep of a result."""
    result = json.loads(path.read_text(encoding="utf-8"))
    named = path.resolve()
    record = str(named.relative_to(ROOT)) if named.is_relative_to(ROOT) else path.name
    shared = {"record": record, "date": result["date"], "commit": result["commit"]}
    if "rows" in result:
        for row in result["rows"]:
            yield _entry(row, row, f"BPE of {result['size']} size", shared)
        return
    for part, variants in PARTS.items():
        rows = {row["name"]: row for row in result.get(part, ())}
        for variant in variants:
            if variant.name in rows:
                yield from _of_bytes(variant, rows[variant.name], shared)


def _of_bytes(
    variant: Variant, row: Mapping[str, Any], shared: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    what = {
        "axis": variant.axis.value,
        "parameterization": variant.config.model_dump(mode="json"),
        "optimizer": optimizer(variant.kind, 1.0).model_dump(mode="json"),
        "model": variant.model.model_dump(mode="json"),
    }
    steps = "" if variant.axis == Axis.HORIZON else f"{STEPS} steps of "
    setting = f"byte models, {steps}{SEQUENCES * LENGTH} tokens{' a step' if not steps else ''}"
    yield _entry(row, what, setting, shared)
    for reading in variant.readings:
        if reading.name in OTHER_RULES:
            changed = what["parameterization"] | OTHER_RULES[reading.name]
            yield _entry(row, what | {"parameterization": changed}, setting, shared, reading)


def _entry(
    row: Mapping[str, Any],
    what: Mapping[str, Any],
    setting: str,
    shared: Mapping[str, Any],
    reading: Reading | None = None,
) -> dict[str, Any]:
    sweeps = sweeps_of(row)
    if reading is not None:
        sweeps = under(reading, sweeps)
    found, model = regrets(sweeps), what["model"]
    small = f"{setting}, {model['num_layers']} layers of {model['width']} at the least"
    return {
        **shared,
        "name": reading.name if reading else row["name"],
        "axis": what["axis"],
        "parameterization": what["parameterization"],
        "optimizer": {key: what["optimizer"].get(key) for key in ("kind", "step_norm")},
        "mixture": model["kind"] == "moe",
        "setting": small,
        "base": min(sweeps),
        "seeds": next(iter(sweeps.values())).losses_RS.shape[1],
        "drift_octaves": None if (octaves := drift(sweeps)) != octaves else round(octaves, 3),
        "regrets": {
            str(size): {
                "percent": _rounded(one.describe()["percent"]),
                "interval": [_rounded(end) for end in one.describe()["percent_interval"]],
                "diverged": one.describe()["diverged"],
                "verdict": one.verdict(),
                "problem": one.problem,
            }
            for size, one in found.items()
        },
    }


def sweeps_of(row: Mapping[str, Any]) -> dict[int, Sweep]:
    """Return the losses of a row, at the rates available for all seeds."""
    losses = {
        Trial(int(size), float(rate), int(seed)): float("inf") if loss is None else float(loss)
        for size, rate, seed, loss in row["losses"]
    }
    seeds = tuple(sorted({trial.seed for trial in losses}))
    found = Transfer(Axis.WIDTH, seeds, losses)
    return {size: found.sweep(size) for size in found.sizes}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=FILE)
    asked = parser.parse_args(given)
    text = json.dumps(table(asked.results), indent=1) + "\n"
    asked.out.write_text(text, encoding="utf-8")
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
