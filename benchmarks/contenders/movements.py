"""Coordinate checks of several parameterizations: size of activation changes by width and depth."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from allometry.configs.model import ParameterizationConfig
from allometry.scaling.shapes import Axis
from allometry.studies.sweeps.coordinate import CoordinateCheck, Movement, slopes
from allometry.studies.sweeps.probe import LOGITS, STREAM
from contenders.families import (
    ADAM,
    BASE,
    LENGTH,
    SPECTRAL,
    SPHERES,
    model,
    optimizer,
    parameterization,
    spheres,
)
from contenders.machine import source_bytes
from contenders.variants import MAXIMAL, STANDARD


def deep(alpha: float) -> ParameterizationConfig:
    return parameterization(
        kind="completep",
        embedding_std=1.0,
        base_width=BASE,  # whose rate is 2⁻⁶, as in the other rows
        base_layers=2,
        depth_alpha=alpha,
    )


def coordinates(
    quick: bool,
) -> list[tuple[str, ParameterizationConfig, str, Axis, tuple[int, ...]]]:
    """Return (name, parameterization, optimizer, axis, sizes) of each check."""
    widths = (32, 64) if quick else (32, 64, 128, 256, 512)
    layers = (2, 4) if quick else (2, 4, 8, 16, 32)
    deep_mup = parameterization(kind="mup", embedding_std=1.0, base_width=BASE)
    return [
        ("sp", STANDARD, ADAM, Axis.WIDTH, widths),
        ("mup", MAXIMAL, ADAM, Axis.WIDTH, widths),
        ("hyperp, head .02", spheres(head_std=0.02), SPHERES, Axis.WIDTH, widths),
        ("hyperp, logits / m", spheres(output_multiplier="1/m"), SPHERES, Axis.WIDTH, widths),
        (
            "hyperp, logits / m, spectral",
            spheres(output_multiplier="1/m"),
            SPECTRAL,
            Axis.WIDTH,
            widths,
        ),
        ("mup", deep_mup, ADAM, Axis.DEPTH, layers),
        ("depth-mup", deep(0.5), ADAM, Axis.DEPTH, layers),
        ("completep", deep(1.0), ADAM, Axis.DEPTH, layers),
        ("hyperp, head .02", spheres(128, head_std=0.02), SPHERES, Axis.DEPTH, layers),
    ]


def run_coordinates(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    seeds = given.seeds_of["coordinates"]
    batches = source_bytes(seeds * 4, LENGTH).reshape(seeds, 4, LENGTH + 1)
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
        settings = {"sizes": list(sizes), "seeds": seeds, "config": config.model_dump()}
        movements = _kept(kept, settings)
        if movements is None:
            movements = check.run(sizes, range(seeds), axis, given.processes)
            described = [asdict(movement) for movement in movements]
            kept.write_text(json.dumps({**settings, "movements": described}))
        found = slopes(movements)
        above = slopes([movement for movement in movements if movement.size > sizes[0]])
        rows.append(
            {
                "name": name,
                "axis": axis.value,
                "sizes": list(sizes),
                "slopes": found,
                "slopes_without_the_least": above,
            }
        )
        print(
            f"{name:<24}{axis.value:<8}stream {found[STREAM]:+.2f}  logits {found[LOGITS]:+.2f}"
            f"  (without the least size {above[STREAM]:+.2f} {above[LOGITS]:+.2f})",
            flush=True,
        )
    return rows


def _kept(path: Path, settings: dict[str, Any]) -> list[Movement] | None:
    """Return the movements that an earlier run stored for the same settings, or None."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    if any(found.get(key) != value for key, value in settings.items()):
        return None
    return [
        Movement(row["size"], row["seed"], row["rms"], tuple(row["losses"]))
        for row in found["movements"]
    ]
