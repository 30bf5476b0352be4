"""Do rates found small hold large? Coordinate checks and learning-rate sweeps, by parameterization.

    python benchmarks/transfer.py [--quick] [--only coordinates|rates] [--processes 2] [--work DIR]

A byte model on Python's library: 2 layers, heads of 16, qk-norm, fp32. Every trial's loss is kept
in --work as soon as it is known, so that the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contenders.machine import facts, source_bytes
from pydantic import TypeAdapter

from allometry.configs.model import DenseModel, ParameterizationConfig
from allometry.configs.optimization import AdamW, MuonH, OptimizerConfig
from allometry.laws.optimum import drift_interval
from allometry.scaling.shapes import Axis
from allometry.trainer.coordinate import CoordinateCheck, Movement, slopes
from allometry.trainer.probe import LOGITS, STREAM
from allometry.trainer.transfer import Runner, Transfer, TransferSweep
from allometry.trainer.trials import TrialLog

LENGTH, SEQUENCES, STEPS, HELD_OUT = 64, 8, 80, 128
BASE = 32
ADAM, SPHERES = "adamw", "muonh"


def model(width: int, layers: int) -> DenseModel:
    return DenseModel(
        vocab_size=128,
        width=width,
        num_layers=layers,
        num_heads=width // 16,
        ffn_width=4 * width,
        qk_norm=True,
    )


def optimizer(kind: str, lr: float) -> OptimizerConfig:
    if kind == ADAM:
        return AdamW(lr=lr, weight_decay=0.0)
    return MuonH(lr=lr)


def parameterization(**values: Any) -> ParameterizationConfig:
    parsed: ParameterizationConfig = TypeAdapter(ParameterizationConfig).validate_python(values)
    return parsed


def spheres(base_width: int = BASE, **changes: Any) -> ParameterizationConfig:
    return parameterization(
        kind="hyperp", embedding_std=0.5, base_width=base_width, base_layers=2, **changes
    )


@dataclass(frozen=True)
class Variant:
    """One column: a parameterization, widths, first rates; the drift that is asked of it."""

    name: str
    config: ParameterizationConfig
    kind: str
    widths: tuple[int, ...]
    log2_lrs: tuple[float, ...]
    least: float = 0.0
    most: float = math.inf

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


LOW, HIGH = (-7.0, -6.5, -6.0, -5.5, -5.0, -4.5), (-5.0, -4.5, -4.0, -3.5, -3.0, -2.5)
WIDTHS = (32, 64, 128, 256)
RATES = (
    Variant("sp", parameterization(kind="sp", embedding_std=1.0), ADAM, WIDTHS[:3], LOW, 1.5),
    Variant(
        "mup",
        parameterization(kind="mup", embedding_std=1.0, base_width=BASE),
        ADAM,
        WIDTHS,
        LOW,
        most=0.3,
    ),
    Variant("hyperp, head .02", spheres(head_std=0.02), SPHERES, WIDTHS[:3], HIGH, 1.5),
    Variant(
        "hyperp, head .02, logits / m",
        spheres(head_std=0.02, output_multiplier="1/m"),
        SPHERES,
        WIDTHS[:3],
        HIGH,
    ),
    Variant("hyperp, base head", spheres(), SPHERES, WIDTHS, HIGH, most=0.9),
    Variant(
        "hyperp, base head, logits / m",
        spheres(output_multiplier="1/m"),
        SPHERES,
        WIDTHS,
        HIGH,
        most=0.5,
    ),
)


def deep(alpha: float) -> ParameterizationConfig:
    return parameterization(
        kind="completep",
        embedding_std=1.0,
        base_width=128,
        base_layers=2,
        depth_alpha=alpha,
    )


def coordinates(
    quick: bool,
) -> list[tuple[str, ParameterizationConfig, str, Axis, tuple[int, ...]]]:
    """(name, parameterization, optimizer, axis, sizes)."""
    widths = (32, 64) if quick else (32, 64, 128, 256, 512)
    layers = (2, 4) if quick else (2, 4, 8, 16, 32)
    mup = RATES[1].config
    deep_mup = parameterization(kind="mup", embedding_std=1.0, base_width=128)
    return [
        ("sp", RATES[0].config, ADAM, Axis.WIDTH, widths),
        ("mup", mup, ADAM, Axis.WIDTH, widths),
        ("hyperp, head .02", spheres(head_std=0.02), SPHERES, Axis.WIDTH, widths),
        ("hyperp, logits / m", spheres(output_multiplier="1/m"), SPHERES, Axis.WIDTH, widths),
        ("mup", deep_mup, ADAM, Axis.DEPTH, layers),
        ("depth-mup", deep(0.5), ADAM, Axis.DEPTH, layers),
        ("completep", deep(1.0), ADAM, Axis.DEPTH, layers),
        ("hyperp, head .02", spheres(128, head_std=0.02), SPHERES, Axis.DEPTH, layers),
    ]


def run_coordinates(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    batches = source_bytes(given.seeds * 4, LENGTH).reshape(given.seeds, 4, LENGTH + 1)
    for name, config, kind, axis, sizes in coordinates(given.quick):
        width = BASE if axis == Axis.WIDTH or given.quick else 128
        check = CoordinateCheck(
            model=model(width, 2),
            parameterization=config,
            optimizer=optimizer(kind, 2.0**-6),
            tokens_GBL=batches,
        )
        slug = "".join(c if c.isalnum() else "-" for c in f"{name}-{axis}")
        kept = given.work / f"coordinates-{slug}.json"
        settings = {"sizes": list(sizes), "seeds": given.seeds, "config": config.model_dump()}
        movements = _kept(kept, settings)
        if movements is None:
            movements = check.run(sizes, range(given.seeds), axis, given.processes)
            described = [movement.describe() for movement in movements]
            kept.write_text(json.dumps({**settings, "movements": described}))
        found = slopes(movements)
        rows.append({"name": name, "axis": axis.value, "sizes": list(sizes), "slopes": found})
        print(
            f"{name:<24}{axis.value:<8}stream {found[STREAM]:+.2f}  logits {found[LOGITS]:+.2f}",
            flush=True,
        )
    return rows


def _kept(path: Path, settings: dict[str, Any]) -> list[Movement] | None:
    """The movements that an earlier run left for the same settings."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if any(found.get(key) != value for key, value in settings.items()):
        return None
    return [
        Movement(row["size"], row["seed"], row["rms"], tuple(row["losses"]))
        for row in found["movements"]
    ]


def run_rates(given: argparse.Namespace) -> list[dict[str, Any]]:
    steps = 20 if given.quick else STEPS
    pool = source_bytes(4 * STEPS * SEQUENCES + HELD_OUT, LENGTH)
    rows = []
    for variant in RATES:
        sweep = TransferSweep(
            model=model(BASE, 2),
            parameterization=variant.config,
            optimizer=optimizer(variant.kind, 1.0),
            pool_PL=pool[:-HELD_OUT],
            held_out_HL=pool[-HELD_OUT:],
            axis=Axis.WIDTH,
            steps=steps,
            sequences=SEQUENCES,
        )
        log = TrialLog(given.work / f"rates-{variant.slug}-{steps}.jsonl", sweep.settings())
        runner = Runner(
            sweep, variant.log2_lrs, 0.5, given.processes, known=log.known, done=log.add
        )
        widths = variant.widths[:2] if given.quick else variant.widths
        found = runner.run(widths, tuple(range(given.seeds)))
        rows.append(_row(variant, found))
        print(_line(variant, found), flush=True)
    return rows


def _row(variant: Variant, found: Transfer) -> dict[str, Any]:
    drift = found.drift()
    met = variant.least <= drift <= variant.most
    return {
        "name": variant.name,
        "least": variant.least,
        "most": None if math.isinf(variant.most) else variant.most,
        "met": met,
        **found.describe(),
        "losses": [
            [trial.size, trial.log2_lr, trial.seed, loss if math.isfinite(loss) else None]
            for trial, loss in sorted(found.losses.items())
        ],
    }


def _line(variant: Variant, found: Transfer) -> str:
    optima = found.optima()
    rates = " / ".join(f"{o.log2_lr:.2f}{'' if o.interior else '?'}" for o in optima.values())
    losses = " / ".join(f"{o.loss:.3f}" for o in optima.values())
    low, high = drift_interval({size: found.sweep(size) for size in found.sizes})
    spread = np.mean([found.sweep(size).spread() for size in found.sizes])
    return (
        f"| {variant.name} | {rates} | {found.drift():.2f} ({low:.2f} to {high:.2f}) "
        f"| {spread:.2f} | {losses} |"
    )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two sizes, 20 steps, one seed")
    parser.add_argument("--only", choices=("coordinates", "rates"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-transfer"))
    parser.add_argument("--json", type=Path, default=None)
    parsed = parser.parse_args(given)
    parsed.seeds = 1 if parsed.quick else parsed.seeds
    return parsed


def main() -> None:
    given = arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {**facts(), "seeds": given.seeds, "quick": given.quick}
    if given.only != "rates":
        result["coordinates"] = run_coordinates(given)
    if given.only != "coordinates":
        print("\nlog2 of the best rate by width; drift (95 % over seeds); single seeds apart; loss")
        result["rates"] = run_rates(given)
    path = given.json or Path(__file__).parent / "results" / (
        f"transfer-cpu-{datetime.date.today().isoformat()}.json"
    )
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
